package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"cloister.dev/test/testnode"
)

const kubeVersion = "v1.36.3"

// kubePrograms builds the cluster's programs once and returns their folder.
func kubePrograms(ctx context.Context, checkout string) (string, error) {
	cache, err := testnode.Cache()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kube-"+kubeVersion+"-etcd-v3.6.8")
	done := filepath.Join(dir, "done")
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	fmt.Fprintln(os.Stderr, "building Kubernetes", kubeVersion, "and etcd v3.6.8 (once, some ten minutes)")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	const (
		base = "k8s.io/component-base/version."
		cmd  = "k8s.io/kubernetes/cmd/"
	)
	// The version goes in at link time, so that packages compile the same as anywhere.
	link := "-s -w -X " + base + "gitVersion=" + kubeVersion + " -X " + base + "gitMajor=1 -X " + base + "gitMinor=36" +
		" -X k8s.io/client-go/pkg/version.gitVersion=" + kubeVersion
	module, static := filepath.Join(checkout, "test/e2e/kube"), []string{"CGO_ENABLED=0"}
	if err := testnode.GoBuild(ctx, module, static, "-ldflags", link, "-o", dir+"/", cmd+"kube-apiserver",
		cmd+"kube-controller-manager", cmd+"kube-scheduler", cmd+"kubectl", cmd+"kubelet"); err != nil {
		return "", err
	}
	if err := testnode.GoBuild(ctx, module, static, "-ldflags", "-s -w", "-o", filepath.Join(dir, "etcd"),
		"go.etcd.io/etcd/server/v3"); err != nil {
		return "", err
	}
	return dir, os.WriteFile(done, nil, 0o644)
}
