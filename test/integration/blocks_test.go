package integration

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// handlerInfo is what the verbose status says of a handler.
type handlerInfo struct {
	Type, Path, Reason string
	Works              bool
}

// A daemon runs on the blocks of configuration that administrators have, as
// they stand, and has the handlers that each defines. What else blocks mean is
// tested beside internal/config.
func TestDaemonTakesBlocks(t *testing.T) {
	needRoot(t)
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("the blocks name runc, which is not installed: ", err)
	}
	want := map[string]map[string]string{ // handler: what is in its type or in the reason why it does not work
		"rune-v1":           {"default": "/usr/bin/runc", "rune": "containerd-shim-rune-v2", "runc": runc},
		"kata-handlers-v1":  {"runc": runc, "katacli": "/usr/bin/kata-runtime", "kata": "containerd-shim-kata-v2"},
		"kata-untrusted-v1": {"untrusted": "/usr/bin/kata-runtime", "runc": runc},
		"kata-v2":           {"kata": "containerd-shim-kata-v2", "runc": runc},
		"systemd-cgroup":    {"runc": "systemd"},
		"reference":         {"runc": runc},
		"../defaults/1.5":   {"runc": runc},
		"../defaults/2.4":   {"runc": runc},
		"handlers":          {"crun": "/usr/local/bin/crun", "gvisor": "containerd-shim-runsc-v1", "kata": "containerd-shim-kata-v2", "runc": runc},
	}
	for name, handlers := range want {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			wantHandlers(t, daemonHandlers(t, filepath.Join("../../internal/config/testdata/blocks", name+".toml")), handlers)
		})
	}
}

func wantHandlers(t *testing.T, got map[string]handlerInfo, want map[string]string) {
	t.Helper()
	for name, text := range want {
		h, ok := got[name]
		if !ok {
			t.Errorf("no handler %s among %v", name, slices.Sorted(maps.Keys(got)))
		} else if !strings.Contains(h.Path, text) && !strings.Contains(h.Reason, text) {
			t.Errorf("handler %s is %+v, which does not tell of %s", name, h, text)
		}
	}
}

// daemonHandlers starts a daemon on a file, with folders and socket elsewhere.
func daemonHandlers(t *testing.T, file string) map[string]handlerInfo {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "clb") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(here.bin, "cloister"), "daemon", "--ephemeral", "--config", file,
		"--root", filepath.Join(dir, "root"), "--state", filepath.Join(dir, "state"), "--address", socket)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
	}()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var st *cri.StatusResponse
	eventually(t, 30*time.Second, "the daemon answers", func() bool {
		st, err = cri.NewRuntimeServiceClient(conn).Status(t.Context(), &cri.StatusRequest{Verbose: true})
		return err == nil
	})
	handlers := map[string]handlerInfo{}
	if err := json.Unmarshal([]byte(st.Info["handlers"]), &handlers); err != nil {
		t.Fatalf("%v in %s", err, st.Info["handlers"])
	}
	for _, c := range st.Status.Conditions {
		if c.Type == "ConfigurationAccepted" && !c.Status {
			t.Errorf("the configuration is refused: %s", c.Message)
		}
	}
	return handlers
}
