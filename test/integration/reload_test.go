package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// inForce is what the daemon says of its configuration.
type inForce struct {
	Generation        int
	WaitingForRestart []string
	conditions        map[string]*cri.RuntimeCondition
	handlers          []string
}

func configuration(t *testing.T, n *testnode.Node) inForce {
	t.Helper()
	st, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	c := inForce{conditions: map[string]*cri.RuntimeCondition{}}
	if err := json.Unmarshal([]byte(st.Info["config"]), &c); err != nil {
		t.Fatalf("%v in %s", err, st.Info["config"])
	}
	for _, k := range st.Status.Conditions {
		c.conditions[k.Type] = k
	}
	for _, h := range st.RuntimeHandlers {
		c.handlers = append(c.handlers, h.Name)
	}
	return c
}

// extra replaces the file that is laid over the node's own, as a whole.
func extra(t *testing.T, n *testnode.Node, text string) {
	t.Helper()
	path := filepath.Join(n.Dir, "extra.toml")
	if err := os.WriteFile(path+".new", []byte("version = 4\n"+text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// reload puts a file into force.
func reload(t *testing.T, n *testnode.Node, text string) {
	t.Helper()
	before := configuration(t, n).Generation
	extra(t, n, text)
	if err := syscall.Kill(n.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the configuration is in force", func() bool { return configuration(t, n).Generation > before })
}

const handlerTable = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.%s]\nruntime_type = \"io.containerd.runc.v2\"\n"

// limited is a handler whose containers may open so many files.
func limited(name string, files int) string {
	return fmt.Sprintf(handlerTable+"[cloister.handlers.%[1]s.ulimits]\nnofile = \"%[2]d\"\n", name, files)
}

// A pod keeps the version of its handler that it was started with, over
// reloads and restarts, and when the handler is gone.
func TestReloadKeepsHandlersOfPods(t *testing.T) {
	n := own(t, testnode.Options{Extra: "version = 4\n" + limited("mine", 1111)})
	old := runHandlerPod(t, n, "mine")
	files := func(p *pod) string {
		t.Helper()
		c := p.sh("ulimit -n; sleep 1000")
		c.waitLog("1")
		defer c.stop(0)
		return c.run("cat /proc/1/limits | grep files")
	}
	has := func(p *pod, limit string) {
		t.Helper()
		if got := files(p); !slices.Contains(strings.Fields(got), limit) {
			t.Errorf("a container may open %s, want %s", got, limit)
		}
	}
	has(old, "1111")
	reload(t, n, limited("mine", 2221))
	young := runHandlerPod(t, n, "mine")
	has(young, "2221")
	has(old, "1111")

	reload(t, n, limited("other", 3331))
	_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t), RuntimeHandler: "mine"})
	wantError(t, err, codes.InvalidArgument, "mine", "other")
	has(runHandlerPod(t, n, "other"), "3331")
	has(old, "1111")

	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	has(old, "1111")
	has(young, "2221")
	reload(t, n, limited("mine", 4441))
	has(old, "1111")
	has(runHandlerPod(t, n, "mine"), "4441")
}

// A file that is refused changes nothing, and is told of where people look.
func TestBadFileChangesNothing(t *testing.T) {
	n := own(t, testnode.Options{Extra: "version = 4\n" + limited("mine", 1111)})
	before := configuration(t, n)
	for _, typ := range []string{"ConfigurationAccepted", "NoDeprecatedConfiguration", "NetworkConfigurationAccepted"} {
		if c := before.conditions[typ]; c == nil || !c.Status {
			t.Errorf("condition %s is %v", typ, c)
		}
	}
	validate := func() (string, error) {
		out, err := exec.Command(filepath.Join(here.bin, "cloister"), "config", "validate", filepath.Join(n.Dir, "config.toml")).CombinedOutput()
		return string(out), err
	}
	if out, err := validate(); err != nil {
		t.Errorf("a good file: %v: %s", err, out)
	}
	for name, bad := range map[string]struct{ text, want string }{
		"syntax":  {"root = \"", "extra.toml:2"},
		"slip":    {"[debug]\nlevl = \"debug\"\n", `did you mean "level"?`},
		"type":    {fmt.Sprintf(handlerTable, "mine") + "pod_annotations = \"a\"\n", "is a list of strings"},
		"default": {"[plugins.\"io.containerd.cri.v1.runtime\".containerd]\ndefault_runtime_name = \"gone\"\n", "gone"},
	} {
		extra(t, n, bad.text)
		eventually(t, 20*time.Second, name+" is refused", func() bool {
			c := configuration(t, n).conditions["ConfigurationAccepted"]
			return !c.Status && strings.Contains(c.Message, bad.want)
		})
		now := configuration(t, n)
		if now.Generation != before.Generation || !slices.Equal(now.handlers, before.handlers) {
			t.Errorf("%s: from %+v to %+v", name, before, now)
		}
		if out, err := validate(); err == nil && name != "default" || !strings.Contains(out, bad.want) && name != "default" {
			t.Errorf("%s: validate says %v: %s", name, err, out)
		}
		runHandlerPod(t, n, "mine")
	}
	extra(t, n, limited("mine", 1111)+"[plugins.\"io.containerd.cri.v1.runtime\".cni]\nbin_dir = \"/opt/cni/bin\"\n")
	eventually(t, 20*time.Second, "a good file is in force", func() bool {
		c := configuration(t, n)
		old := c.conditions["NoDeprecatedConfiguration"]
		return c.conditions["ConfigurationAccepted"].Status && !old.Status && strings.Contains(old.Message, "bin_dirs")
	})
}

// Registries, networks and the log level follow the file.
func TestReloadActs(t *testing.T) {
	n := own(t, testnode.Options{Extra: "version = 4\n"})
	empty := t.TempDir()
	registry := "[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = %q\n"
	remove := func() {
		t.Helper()
		if _, err := n.Image.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: demo}}); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	reload(t, n, fmt.Sprintf(registry, empty))
	if _, err := pull(t.Context(), n, demo); err == nil {
		t.Error("an image came from a registry that is not configured any more")
	}
	reload(t, n, fmt.Sprintf(registry, here.hosts))
	if _, err := pull(t.Context(), n, demo); err != nil {
		t.Errorf("pull after the registry is back: %v", err)
	}

	conf, err := os.ReadFile(filepath.Join(n.Dir, "net.d", "10-test.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	first := runPod(t, n).status().Network.Ip
	other := filepath.Join(n.Dir, "other.d")
	if err := os.MkdirAll(other, 0o755); err != nil {
		t.Fatal(err)
	}
	moved := bytes.ReplaceAll(bytes.ReplaceAll(conf, []byte(`"dataDir": "`+n.Dir+`/ipam"`), []byte(`"dataDir": "`+n.Dir+`/ipam2"`)),
		[]byte(`"name": "`), []byte(`"name": "second-`))
	if err := os.WriteFile(filepath.Join(other, "10.conflist"), moved, 0o644); err != nil {
		t.Fatal(err)
	}
	reload(t, n, fmt.Sprintf("[plugins.\"io.containerd.cri.v1.runtime\".cni]\nconf_dir = %q\n", other))
	if second := runPod(t, n).status().Network.Ip; second != first { // each book begins anew
		t.Errorf("a pod of the other network has %s, want %s of its own book", second, first)
	}
	if err := os.WriteFile(filepath.Join(other, "10.conflist"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "a bad network file is told", func() bool {
		c := configuration(t, n).conditions["NetworkConfigurationAccepted"]
		return !c.Status && strings.Contains(c.Message, "10.conflist")
	})
	reload(t, n, "root = \"/elsewhere\"\n")
	if got := configuration(t, n).WaitingForRestart; len(got) != 0 { // the flag wins over the file
		t.Errorf("waiting are %v", got)
	}
	reload(t, n, "[plugins.\"io.containerd.grpc.v1.cri\"]\nstream_idle_timeout = \"1h\"\n")
	if got, want := configuration(t, n).WaitingForRestart, `plugins."io.containerd.grpc.v1.cri".stream_idle_timeout`; !slices.Contains(got, want) {
		t.Errorf("waiting are %v, want %s", got, want)
	}
}

// A hundred reloads while pods start and end: none of them fails.
func TestReloadUnderLoad(t *testing.T) {
	n := own(t, testnode.Options{Extra: "version = 4\n"})
	ctx, stop := context.WithCancel(t.Context())
	var pods atomic.Int64
	var failed sync.Map
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() {
			for ctx.Err() == nil {
				if err := onePod(t, n); err != nil {
					failed.Store(err.Error(), true)
					return
				}
				pods.Add(1)
			}
		})
	}
	const reloads = 100
	for i := range reloads {
		reload(t, n, fmt.Sprintf("%s[plugins.\"io.containerd.cri.v1.images\".registry.headers]\nX-Reload = [\"%d\"]\n"+
			"[plugins.\"io.containerd.cri.v1.runtime\".cni]\nmax_conf_num = %d\n", limited(fmt.Sprintf("h%d", i/10%2), 1024+i), i, i%3))
	}
	stop()
	work.Wait()
	failed.Range(func(err, _ any) bool {
		t.Error(err)
		return true
	})
	c := configuration(t, n)
	if c.Generation <= reloads || !slices.Contains(c.handlers, "h1") || slices.Contains(c.handlers, "h0") {
		t.Errorf("in the end %+v", c)
	}
	t.Logf("%d pods lived during %d reloads", pods.Load(), c.Generation-1)
	if pods.Load() < 2 {
		t.Error("too few pods to tell")
	}
}

// onePod runs a pod with a container from its birth to its end.
func onePod(t *testing.T, n *testnode.Node) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: podConfig(n, t)})
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	p := &pod{t, n, r.PodSandboxId, podConfig(n, t)}
	c, err := p.tryCreate(ctx, containerConfig(busybox, []string{"sleep", "1000"}))
	if err == nil {
		err = c.tryStart()
	}
	_, stopErr := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
	_, removeErr := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
	return errors.Join(err, stopErr, removeErr)
}
