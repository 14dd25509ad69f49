package integration

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// Two daemons on one machine know nothing of each other: same pod names,
// either one is ended, and each fsck finds its own node healthy.
func TestTwoDaemonsSideBySide(t *testing.T) {
	a, b := own(t, testnode.Options{}), another(t)
	same := func(c *cri.PodSandboxConfig) {
		c.Metadata = &cri.PodSandboxMetadata{Name: "same", Uid: "same", Namespace: "same"}
	}
	pa, pb := runPod(t, a, same), runPod(t, b, same)
	ca, cb := pa.idle(), pb.idle()
	for _, n := range []*testnode.Node{a, b} {
		list, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
		if err != nil || len(list.Containers) != 1 {
			t.Errorf("%d containers, not 1: %v", len(list.GetContainers()), err)
		}
		if found := fsck(t, n); found != "" {
			t.Errorf("fsck finds %s", found)
		}
	}
	if err := a.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := cb.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
	fsck(t, b, "--repair")
	if err := a.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := ca.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
	if ipa, ipb := pa.status().Network.Ip, pb.status().Network.Ip; ipa == "" || ipb == "" || strings.Contains(ipa, "/") {
		t.Errorf("addresses %q and %q", ipa, ipb)
	}
	pb.remove()
	if out := ca.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
}

// another is another node beside own's.
func another(t *testing.T) *testnode.Node {
	t.Helper()
	n, err := here.start(t.Context(), testnode.Options{Network: "builtin"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closeNode(n); err != nil {
			t.Error(err)
		}
	})
	return n
}
