package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// finding is one line of fsck's report.
type finding struct {
	Kind, ID, Path, Detail, Error string
	Repaired                      bool
}

// findings are what fsck reports, by kind.
func findings(t *testing.T, n *testnode.Node, args ...string) map[string][]finding {
	t.Helper()
	text := fsck(t, n, args...)
	if text == "" {
		return nil
	}
	var all struct{ Findings []finding }
	if i := strings.Index(text, "{"); i < 0 || json.NewDecoder(strings.NewReader(text[i:])).Decode(&all) != nil {
		t.Fatalf("fsck said %s", text)
	}
	byKind := map[string][]finding{}
	for _, f := range all.Findings {
		byKind[f.Kind] = append(byKind[f.Kind], f)
	}
	return byKind
}

// tamper changes the pod store of a node whose daemon does not run.
func tamper(t *testing.T, n *testnode.Node, change func(sandboxes, containers *bolt.Bucket) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(n.Root(), "pods.db"), 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bolt.Tx) error {
		return change(tx.Bucket([]byte("sandboxes")), tx.Bucket([]byte("containers")))
	}); err != nil {
		t.Fatal(err)
	}
}

// restartWith kills the daemon, changes its store and starts the next one.
func restartWith(t *testing.T, n *testnode.Node, change func(sandboxes, containers *bolt.Bucket) error) {
	t.Helper()
	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	tamper(t, n, change)
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A pod whose records are lost is found by all that it has on the machine, and
// the repair takes exactly that away.
func TestFsckAfterLostRecords(t *testing.T) {
	ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/data": {}} }, file{path: "/data/x", data: []byte("x")}))
	for _, network := range []string{"cni", "builtin"} {
		t.Run(network, func(t *testing.T) {
			n := own(t, testnode.Options{Network: network})
			witness(t, n)
			if _, err := pull(t.Context(), n, ref); err != nil {
				t.Fatal(err)
			}
			check := noLeak(t, n)
			p := &pod{t: t, n: n, cfg: podConfig(n, t, func(c *cri.PodSandboxConfig) {
				c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
				c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: int32(32000 + os.Getpid()%700 + len(network))}}
			})}
			r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: p.cfg})
			if err != nil {
				t.Fatal(err)
			}
			p.id = r.PodSandboxId
			c := p.create(ref, []string{"sh", "-c", trapping}, func(c *cri.ContainerConfig) {
				c.Mounts = []*cri.Mount{{ContainerPath: "/volume", Image: &cri.ImageSpec{Image: ref}, Readonly: true}}
			})
			c.start()
			c.waitLog("ready")
			group := cgroupOf(t, c, "pids")
			restartWith(t, n, func(sandboxes, containers *bolt.Bucket) error {
				if err := containers.Delete([]byte(c.id)); err != nil {
					return err
				}
				return sandboxes.Delete([]byte(p.id))
			})
			lost := strings.Repeat("fedcba9876543210", 4)
			empty := plantCgroups(t, n, lost)
			found := findings(t, n)
			want := map[string][]string{
				"shim": {c.id, p.id}, "bundle": {c.id}, "netns": {p.id}, "volume": {c.id},
				"snapshot": {c.id, c.id + "-image-0"}, "network": {p.id}, "cgroup": slices.Repeat([]string{lost}, empty),
			}
			compare(t, found, want)
			if processesIn(group) == 0 {
				t.Error("a listing ended the container")
			}
			repaired := findings(t, n, "--repair")
			compare(t, repaired, want)
			for kind, list := range repaired {
				for _, f := range list {
					if !f.Repaired || f.Error != "" {
						t.Errorf("%s: %+v", kind, f)
					}
				}
			}
			if found := fsck(t, n); found != "" {
				t.Errorf("after the repair fsck finds %s", found)
			}
			if processesIn(group) != 0 {
				t.Error("the repair left the container's processes")
			}
			check()
			again := runPod(t, n, func(cfg *cri.PodSandboxConfig) { cfg.PortMappings = p.cfg.PortMappings })
			if st := again.sh("exit 3").ended(); st.ExitCode != 3 {
				t.Errorf("exit code %d, not 3", st.ExitCode)
			}
		})
	}
}

// plantCgroups makes the empty cgroups that a container leaves whose end
// nobody took care of, and gives how many.
func plantCgroups(t *testing.T, n *testnode.Node, id string) int {
	t.Helper()
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(n.Dir))
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		tops = []string{"/sys/fs/cgroup/" + filepath.Base(n.Dir)}
	}
	count := 0
	for _, top := range tops {
		if fi, err := os.Lstat(filepath.Dir(top)); err != nil || !fi.IsDir() {
			continue // a second name of the hierarchy
		}
		if err := os.MkdirAll(filepath.Join(top, id, "inner"), 0o755); err != nil {
			t.Fatal(err)
		}
		count++
	}
	return count
}

func compare(t *testing.T, found map[string][]finding, want map[string][]string) {
	t.Helper()
	got := map[string][]string{}
	for kind, list := range found {
		for _, f := range list {
			if f.Detail == "" {
				t.Errorf("%+v says nothing", f)
			}
			if kind == "cgroup" && slices.Contains(want["netns"], f.ID) {
				continue // that of the holder of the pod's PIDs, where it has one
			}
			got[kind] = append(got[kind], f.ID)
		}
		slices.Sort(got[kind])
	}
	for _, ids := range want {
		slices.Sort(ids)
	}
	if !maps.EqualFunc(got, want, slices.Equal[[]string]) {
		t.Errorf("found\n%v\nnot\n%v", got, want)
	}
}

// A mount that something left in a pod's folder is named and taken away; what
// is behind it is not.
func TestFsckUnmountsAndKeepsWhatIsBehind(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	precious := t.TempDir()
	if err := os.WriteFile(filepath.Join(precious, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	id := strings.Repeat("0123456789abcdef", 4)
	for _, at := range []string{filepath.Join(n.State(), "pods", id, "x"), filepath.Join(n.State(), "containers", id, "rootfs"), filepath.Join(n.Root(), "volumes", id, "0")} {
		if err := os.MkdirAll(at, 0o700); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := unix.Mount(precious, at, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := map[string][]string{"netns": {id}, "bundle": {id}, "volume": {id}}
	compare(t, findings(t, n), want)
	compare(t, findings(t, n, "--repair"), want)
	if found := fsck(t, n); found != "" {
		t.Errorf("after the repair fsck finds %s", found)
	}
	if _, err := os.Stat(filepath.Join(precious, "file")); err != nil {
		t.Errorf("the repair reached through a mount: %v", err)
	}
	check()
}

// A store with records that cannot be read costs their pods and nobody else's.
func TestDamagedRecords(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	beside := runPod(t, n)
	healthy, sick := beside.sh(trapping), beside.sh(trapping)
	lost := &pod{t: t, n: n, cfg: podConfig(n, t)}
	r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: lost.cfg})
	if err != nil {
		t.Fatal(err)
	}
	lost.id = r.PodSandboxId
	inside := lost.sh(trapping)
	for _, c := range []*container{healthy, sick, inside} {
		c.waitLog("ready")
	}
	restartWith(t, n, func(sandboxes, containers *bolt.Bucket) error {
		if err := containers.Put([]byte(sick.id), []byte("\x00\x00rubbish")); err != nil {
			return err
		}
		whole := sandboxes.Get([]byte(lost.id))
		return sandboxes.Put([]byte(lost.id), slices.Clone(whole[:len(whole)/2]))
	})
	log := n.LogTail(100)
	for _, id := range []string{sick.id, lost.id} {
		if !strings.Contains(log, id) {
			t.Errorf("the log does not name the record %s", id)
		}
	}
	if out := healthy.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
	if st := inside.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container of the pod without a record is %v", st.State)
	}
	again := beside.sh("exit 3")
	if st := again.ended(); st.ExitCode != 3 {
		t.Errorf("exit code %d, not 3", st.ExitCode)
	}
	// The pod that kubelet wants can be made anew, and this goes for a restart.
	endWith(t, n, n.Stop)
	id, err := runSandbox(t.Context(), n, lost.cfg, 30*time.Second)
	if err != nil || id == lost.id {
		t.Errorf("the pod made anew is %s, %v", id, err)
	}
	found := findings(t, n)
	named := fmt.Sprint(found["record"])
	for _, id := range []string{sick.id, lost.id} {
		if !strings.Contains(named, id) {
			t.Errorf("fsck does not name the record of %s: %v", id, found)
		}
	}
	findings(t, n, "--repair")
	if found := fsck(t, n); found != "" {
		t.Errorf("after the repair fsck finds %s", found)
	}
	healthy.stop(5)
	if st := healthy.status(); st.ExitCode != 40 {
		t.Errorf("exit code %d, not 40", st.ExitCode)
	}
	(&pod{t, n, id, lost.cfg}).remove()
	beside.remove()
	check()
}
