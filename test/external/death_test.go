package external

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testRestart ends the daemon while one container runs and two others end.
func testRestart(t *testing.T, m machine, end func(context.Context) error) {
	p := m.mustRun(t, strings.ReplaceAll(filepath.Base(t.Name()), "_", "-"))
	defer p.mustRemove(t)
	writer := p.mustStart(t, script("writer", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done"))
	signal := filepath.Join(m.Dir, "go")
	defer os.RemoveAll(signal)
	waiter := func(name string, code int) string {
		c := script(name, fmt.Sprintf("echo ready; while [ ! -e /signal/go ]; do sleep 0.05; done; echo bye; exit %d", code))
		c.Mounts = []*cri.Mount{{ContainerPath: "/signal", HostPath: signal}}
		return p.mustStart(t, c)
	}
	if err := os.MkdirAll(signal, 0o755); err != nil {
		t.Fatal(err)
	}
	ends, fails := waiter("ends", 0), waiter("fails", 33)
	logged(t, p.log("ends"), "ready")
	logged(t, p.log("fails"), "ready")
	if err := end(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(signal, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// Its log goes on while nobody serves.
	logged(t, p.log("ends"), "bye")
	logged(t, p.log("fails"), "bye")
	n := numbered(t, p.log("writer"), 1)
	logged(t, p.log("writer"), fmt.Sprint("line ", n+20))
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := m.ended(t, ends); st.ExitCode != 0 || st.Reason != "Completed" {
		t.Errorf("the container that ended meanwhile is %v", st)
	}
	if st := m.ended(t, fails); st.ExitCode != 33 {
		t.Errorf("the container that exited with 33 meanwhile is %v", st)
	}
	if st := m.status(t, writer); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container that ran is %v", st)
	}
	if r := m.execSync(t, writer, "echo", "still"); string(r.Stdout) != "still\n" {
		t.Errorf("exec after the restart gave %v", r)
	}
	p.mustStart(t, script("later", "sleep 1000"))
	if pids := m.shims(p.id); len(pids) != 1 {
		t.Errorf("the pod has the shims %v", pids)
	}
	if _, err := m.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: writer}); err != nil {
		t.Fatal(err)
	}
	numbered(t, p.log("writer"), 1)
}

// killShim ends the pod's shim, not its containers.
func killShim(t *testing.T, m machine, p pod) {
	t.Helper()
	pids := m.shims(p.id)
	if len(pids) != 1 {
		t.Fatalf("the pod has the shims %v", pids)
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func testShimKilled(t *testing.T, m machine) {
	p, sharing, other := m.mustRun(t, "killed"), sharePID(t, m, "killed-sharing"), m.mustRun(t, "not-killed")
	defer p.mustRemove(t)
	defer sharing.mustRemove(t)
	defer other.mustRemove(t)
	id := p.mustStart(t, script("c", "echo ready; sleep 4712; echo end"))
	sharer := sharing.mustStart(t, shared(script("c", "echo ready; sleep 4712; echo end")))
	bystander := other.mustStart(t, script("c", "sleep 1000"))
	logged(t, p.log("c"), "ready")
	logged(t, sharing.log("c"), "ready")
	killShim(t, m, p)
	killShim(t, m, sharing)
	for _, id := range []string{id, sharer} {
		if st := m.ended(t, id); st.Reason != "Unknown" || st.ExitCode == 0 {
			t.Errorf("a container whose shim was killed is %v", st)
		}
	}
	until(t, "the containers do not run on", func() bool { return !runs("sleep\x004712") })
	if st := m.status(t, bystander); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container of another pod is %v", st)
	}
}

// runs tells whether a process with such arguments is alive.
func runs(args string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(data), args) {
			return true
		}
	}
	return false
}

// testBothKilled ends a pod's shim while no daemon is there to see it.
func testBothKilled(t *testing.T, m machine) {
	p := m.mustRun(t, "both")
	defer p.mustRemove(t)
	id := p.mustStart(t, script("c", "echo ready; sleep 4713"))
	created, err := m.Runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.cfg, Config: script("d", "true")})
	if err != nil {
		t.Fatal(err)
	}
	logged(t, p.log("c"), "ready")
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	killShim(t, m, p)
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := m.ended(t, id); st.Reason != "Unknown" {
		t.Errorf("a container whose shim was killed is %v", st)
	}
	until(t, "the container does not run on", func() bool { return !runs("sleep\x004713") })
	if st := m.status(t, created.ContainerId); st.State != cri.ContainerState_CONTAINER_CREATED {
		t.Errorf("the container that was never started is %v", st)
	}
}

// halfMade is a runc that comes to a stop while it creates a container: its
// folder and its process are there already, and it has not noted that yet.
const halfMade = `#!/bin/sh
root= bundle= id= create=
for a; do
	case $last in --root) root=$a;; --bundle) bundle=$a;; esac
	[ "$a" = create ] && create=yes
	last=$a id=$a
done
if [ ! "$create" ] || [ -e DIR/pass ]; then exec runc "$@"; fi
exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- # the shim's, as runc itself closes them
mkdir -p "$root/$id"
mkfifo "$root/$id/exec.fifo"
hierarchy=/sys/fs/cgroup
[ -e $hierarchy/pids ] && hierarchy=$hierarchy/pids
group=$hierarchy$(sed 's/.*"cgroupsPath":"\([^"]*\)".*/\1/' "$bundle/config.json")
mkdir -p "$group"
setsid sh -c "echo 0 >$group/cgroup.procs; exec sleep 4715" </dev/null >/dev/null 2>&1 &
while [ ! "$(cat "$group/cgroup.procs")" ]; do sleep 0.01; done
touch DIR/called
sleep 1000
`

// A shim is killed while the OCI runtime that it has started makes a container,
// and with it the runtime. Nothing stays of what was made.
func TestShimKilledWhileItsRuntimeWorks(t *testing.T) {
	dir := t.TempDir()
	runc, pass := filepath.Join(dir, "runc"), filepath.Join(dir, "pass")
	for path, text := range map[string]string{runc: strings.ReplaceAll(halfMade, "DIR", dir), pass: ""} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m := start(t, fmt.Sprintf("version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.%s.options]\nBinaryName = %q\n", handler, runc))
	before := m.held(t)
	p := m.mustRun(t, "half-made")
	if err := os.Remove(pass); err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() {
		_, err := p.start(t.Context(), script("c", "true"))
		started <- err
	}()
	until(t, "the runtime is at work", func() bool { _, err := os.Stat(filepath.Join(dir, "called")); return err == nil })
	killShim(t, m, p)
	if err := <-started; err == nil {
		t.Error("a shim was killed, and its container runs")
	}
	p.mustRemove(t)
	m.nothingLeft(t, before)
	if runs("sleep\x004715") {
		t.Error("the container's process runs on")
	}
}

// testStartCutOff makes the daemon forget where the pod's shim listens, as if
// it had been killed before it could note that.
func testStartCutOff(t *testing.T, m machine) {
	p := m.mustRun(t, "cut-off")
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(m.State(), "pods", p.id, "bootstrap.json")); err != nil {
		t.Fatal(err)
	}
	if err := m.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.mustRemove(t)
	if pids := m.shims(p.id); len(pids) != 0 {
		t.Errorf("the pod was removed and its shim %v serves on", pids)
	}
}

// testBadShim swaps the shim's program for ones that do not work.
func testBadShim(t *testing.T, m machine) {
	keep := m.shim + ".kept"
	if err := os.Rename(m.shim, keep); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.Rename(keep, m.shim); err != nil {
			t.Error(err)
		}
	}()
	for name, text := range map[string]string{
		"fails":   "#!/bin/sh\necho out of order >&2\nexit 3\n",
		"rubbish": "#!/bin/sh\necho rubbish\n",
	} {
		if err := os.WriteFile(m.shim, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := m.run(t.Context(), m.podConfig("bad-"+name))
		if err == nil {
			t.Fatalf("a pod runs on a shim that %s", name)
		}
		t.Log(err)
	}
	r, err := m.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Items) != 0 {
		t.Errorf("failed creations left %v", r.Items)
	}
}
