package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// What containers hold is closed to the node's other users, who can read the
// paths in the list of mounts: programs that change the user, shared memory,
// namespaces. So are the daemon's sockets, none of which is an abstract one
// that a pod on the node's network could reach.
func TestStateIsClosedToOthers(t *testing.T) {
	n := own(t, testnode.Options{})
	if err := os.Chmod(n.Root(), 0o700); err != nil { // as the daemon makes it
		t.Fatal(err)
	}
	ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/data": {}} }, file{path: "/data/x", data: []byte("x")}))
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*cri.NamespaceOption){
		"plain": func(*cri.NamespaceOption) {},
		"user namespace": func(o *cri.NamespaceOption) {
			o.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: []*cri.IDMapping{{HostId: 200000, Length: 65536}}, Gids: []*cri.IDMapping{{HostId: 200000, Length: 65536}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			options := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
			change(options)
			if options.UsernsOptions != nil && !supports(t, n).GetUserNamespaces() {
				t.Skip("the default handler has no user namespaces")
			}
			p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
			c := p.create(ref, []string{"sleep", "1000"}, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
			c.start()
			c.says(map[string]string{"cat /data/x": "x", "touch /dev/shm/x && echo yes": "yes", "test -s /etc/hosts && echo yes": "yes"})
			pod, bundle := filepath.Join(n.State(), "pods", p.id), filepath.Join(n.State(), "containers", c.id)
			for _, path := range []string{
				filepath.Join(bundle, "rootfs/bin/busybox"), filepath.Join(bundle, "config.json"), filepath.Join(pod, "shm/x"), filepath.Join(pod, "hosts"),
				filepath.Join(pod, "ns/net"), filepath.Join(n.Root(), "volumes", c.id, "0/x"), filepath.Join(n.Root(), "pods.db"),
				n.Socket, filepath.Join(n.State(), "events.sock"), filepath.Join(n.State(), "shim/container/shim.sock"),
			} {
				if _, err := os.Stat(path); err != nil {
					t.Errorf("the test looks at the wrong place: %v", err)
				}
				for _, id := range []uint32{65534, 200001} {
					cmd := exec.Command("test", "-r", path, "-o", "-w", path, "-o", "-x", path)
					cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id, NoSetGroups: false}}
					if cmd.Run() == nil {
						t.Errorf("user %d of the node has access to %s", id, path)
					}
				}
			}
		})
	}
	sockets, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(sockets)) {
		if strings.Contains(line, "@") && strings.Contains(line, filepath.Base(n.Dir)) {
			t.Errorf("an abstract socket: %s", line)
		}
	}
}
