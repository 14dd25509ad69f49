// Package e2e starts a one-node Kubernetes cluster (kube-apiserver,
// kube-controller-manager, kube-scheduler and kubelet v1.36.3, etcd v3.6.8) as
// host processes, each with folders and ports of its own on loopback, and lets
// kubelet work on a private container runtime. The tests then do with kubectl
// what users of a cluster do.
//
// It must not look into the runtime: everything is seen through Kubernetes.
package e2e
