package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// A handler that needs a TEE is as ready as the device plugin finds it, and
// other handlers do not notice.
func TestHandlerNeedsTEE(t *testing.T) {
	needRoot(t)
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("two handlers of one runtime are compared:", err)
	}
	n := own(t, testnode.Options{Handlers: map[string]string{"plain": runc, "trusted": runc}, Default: "plain"})
	fault := filepath.Join(n.Dir, "fault")
	f, err := os.OpenFile(filepath.Join(n.Dir, "config.toml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(f, "\n[device_plugin]\nenabled = true\nbackends = [\"sim\"]\nkubelet_dir = %q\ncdi_dir = %q\nneeds = { trusted = \"sim\" }\n[device_plugin.sim]\nfault_file = %q\n",
		filepath.Join(n.Dir, "kubelet"), filepath.Join(n.Dir, "cdi"), fault)
	f.Close()
	if err := errors.Join(n.Stop(t.Context()), n.Run(t.Context())); err != nil {
		t.Fatal(err)
	}
	// ready tells what Status says of the TEE, and whether the handler is offered.
	ready := func() (tee, handler bool, message string) {
		r, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range r.Status.Conditions {
			if c.Type == "TEEReady.sim" {
				tee, message = c.Status, c.Message
			}
		}
		handler = slices.ContainsFunc(r.RuntimeHandlers, func(h *cri.RuntimeHandler) bool { return h.Name == "trusted" })
		return tee, handler, message
	}
	until := func(want bool) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			tee, handler, message := ready()
			if tee == want && handler == want {
				return message
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatalf("the TEE is ready: %v (%s), the handler: %v; want %v", tee, message, handler, want)
			}
		}
	}
	until(true)
	runHandlerPod(t, n, "trusted")
	if err := os.WriteFile(fault, []byte("lightning struck"), 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	until(false)
	t.Logf("not ready %v after the loss", time.Since(start).Round(time.Millisecond))
	_, err = n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t), RuntimeHandler: "trusted"})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "backend sim") {
		t.Errorf("a pod that needs the lost TEE: %v", err)
	}
	runHandlerPod(t, n, "plain")
	if err := os.Remove(fault); err != nil {
		t.Fatal(err)
	}
	until(true)
	runHandlerPod(t, n, "trusted")
}
