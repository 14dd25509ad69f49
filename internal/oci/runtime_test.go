package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The tests of this file hand specs to the OCI runtimes of the machine and ask
// the kernel, from inside the container, what came of them.

// podNamespaces starts a process with namespaces of its own, for a container
// to join.
func podNamespaces(t *testing.T, ids ...syscall.SysProcIDMap) Namespaces {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: ids, GidMappings: ids,
		Pdeathsig: syscall.SIGKILL,
	}
	if len(ids) > 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	at := func(kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, kind) }
	ns := Namespaces{Net: at("net"), IPC: at("ipc"), UTS: at("uts"), PrivatePID: true}
	if len(ids) > 0 {
		ns.User = at("user")
	}
	return ns
}

// runnable is a typical input whose image is the machine's own programs.
func runnable(t *testing.T, script string) (in Input, bundle string) {
	t.Helper()
	bundle, err := os.MkdirTemp("/tmp", "cloci")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanUp(t, bundle) })
	root := filepath.Join(bundle, "rootfs")
	write(t, filepath.Join(root, "etc/passwd"), testPasswd)
	write(t, filepath.Join(root, "etc/group"), testGroup)
	write(t, filepath.Join(root, "tmp/file"), "")
	write(t, filepath.Join(bundle, "resolv.conf"), "nameserver 192.0.2.1\n")
	in = typical(t)
	in.ID = filepath.Base(bundle)
	in.Rootfs = root
	in.Namespaces = podNamespaces(t)
	in.Files = Files{ResolvConf: filepath.Join(bundle, "resolv.conf")}
	in.Volumes = nil
	in.Sandbox.Linux.CgroupParent = "/" + in.ID
	in.Config.Mounts = nil
	for _, dir := range []string{"/bin", "/sbin", "/lib", "/lib64", "/usr"} {
		if _, err := os.Stat(dir); err == nil {
			in.Config.Mounts = append(in.Config.Mounts, &runtimeapi.Mount{ContainerPath: dir, HostPath: dir, Readonly: true})
		}
	}
	in.Config.Command, in.Config.Args = []string{"/bin/sh", "-c", script}, nil
	in.Image.Env, in.Image.WorkingDir = nil, "/tmp"
	in.Config.Linux.Resources.OomScoreAdj = 500
	in.Handler.OCIVersion = "1.0.2"
	return in, bundle
}

// cleanUp removes the bundle and the cgroup above the container's, which the
// runtime makes and leaves.
func cleanUp(t *testing.T, bundle string) {
	t.Helper()
	if err := os.RemoveAll(bundle); err != nil {
		t.Error(err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		left, err := filepath.Glob(pattern + filepath.Base(bundle))
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range left {
			if err := os.Remove(dir); err != nil {
				t.Errorf("a cgroup stays: %v", err)
			}
		}
	}
}

// runIn runs the container in a mount namespace without the cgroup2 tree that
// some machines mount beside cgroup v1, which old crun versions refuse.
func runIn(t *testing.T, runtime string, in Input, bundle string) (string, error) {
	t.Helper()
	res, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(res.Spec)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(bundle, "config.json"), string(data))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const script = `if [ "$1" = crun ]; then umount -l /sys/fs/cgroup/unified 2>/dev/null; fi
		exec "$1" --root "$2" run --bundle "$3" "$4"`
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "sh", "-c", script, "sh", runtime, filepath.Join(bundle, "state"), bundle, in.ID)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), nil
}

// eachRuntime runs a test with every OCI runtime that is installed.
func eachRuntime(t *testing.T, test func(t *testing.T, runtime string)) {
	if os.Geteuid() != 0 {
		t.Skip("containers need root")
	}
	if testing.Short() {
		t.Skip("runs containers")
	}
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			if _, err := exec.LookPath(runtime); err != nil {
				t.Skipf("%s is not installed", runtime)
			}
			test(t, runtime)
		})
	}
}

func wantLines(t *testing.T, out string, lines ...string) {
	t.Helper()
	have := map[string]bool{}
	for line := range strings.Lines(out) {
		have[strings.TrimSpace(line)] = true
	}
	for _, want := range lines {
		if !have[want] {
			t.Errorf("no line %q in the output:\n%s", want, out)
		}
	}
}

func TestRuntimeOrdinary(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		in, bundle := runnable(t, `id -u; echo groups=$(id -G); pwd; echo home=$HOME; echo host=$HOSTNAME
			grep -E '^(NoNewPrivs|Seccomp|CapEff|CapInh|CapBnd|CapAmb):' /proc/self/status | tr -d '\t'
			echo oom=$(cat /proc/self/oom_score_adj); echo pid=$$; cat /etc/resolv.conf
			cat /proc/kcore | head -c1 | wc -c; touch /tmp/x 2>&1; touch /proc/sys/x 2>&1
			grep -c ' /sys/fs/cgroup' /proc/self/mounts`)
		security(in).ReadonlyPaths = []string{"/proc/sys", "/tmp"}
		out, err := runIn(t, runtime, in, bundle)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		wantLines(t, out, "1000", "groups=1000 1234 50000", "/tmp", "home=/home/default", "host=web-0",
			"NoNewPrivs:1", "Seccomp:2", "CapBnd:0000000000000400", "CapInh:0000000000000000", "CapAmb:0000000000000000",
			"oom=500", "pid=1", "nameserver 192.0.2.1",
			"touch: cannot touch '/tmp/x': Read-only file system")
	})
}

func TestRuntimePrivileged(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		in, bundle := runnable(t, `id -u; grep -E '^(Seccomp|CapEff|CapInh):' /proc/self/status | tr -d '\t'
			test -c /dev/null && echo null; test -w /proc/sys/kernel/domainname && echo writable
			grep ' /sys sysfs rw' /proc/self/mounts >/dev/null && echo sysfs-rw`)
		in.Config.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
		in.Sandbox.Linux.SecurityContext.Privileged = true
		out, err := runIn(t, runtime, in, bundle)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, own, _ := strings.Cut(string(status), "CapEff:\t")
		own, _, _ = strings.Cut(own, "\n")
		wantLines(t, out, "0", "Seccomp:0", "CapEff:"+own, "CapInh:0000000000000000", "null", "writable", "sysfs-rw")
	})
}

func TestRuntimeMountsAndDevices(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		in, bundle := runnable(t, `echo x > /ro/f 2>/dev/null || echo ro; echo x > /rw/f && echo rw; /rw/prog 2>/dev/null || echo noexec
			test -c /dev/mine && echo device; ls /bin/ls 2>&1; echo root > /f 2>/dev/null || echo readonly-root`)
		host := filepath.Join(bundle, "host")
		write(t, filepath.Join(host, "prog"), "#!/bin/sh\necho ran\n")
		if err := os.Chmod(filepath.Join(host, "prog"), 0o755); err != nil {
			t.Fatal(err)
		}
		in.Config.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
			ReadonlyRootfs: true, MaskedPaths: []string{"/rw/masked"}, ReadonlyPaths: []string{"/proc/sys"},
		}
		in.Config.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "/dev/mine", Permissions: "rwm"}}
		in.Config.Mounts = append(in.Config.Mounts,
			&runtimeapi.Mount{ContainerPath: "/ro", HostPath: host, Readonly: true, RecursiveReadOnly: true},
			&runtimeapi.Mount{ContainerPath: "/rw", HostPath: host, MountOptions: []string{"noexec"}})
		out, err := runIn(t, runtime, in, bundle)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		wantLines(t, out, "ro", "rw", "noexec", "device", "/bin/ls", "readonly-root")
	})
}

func TestRuntimeUserNamespace(t *testing.T) {
	eachRuntime(t, func(t *testing.T, runtime string) {
		in, bundle := runnable(t, `tr -s ' ' </proc/self/uid_map; stat -c owner=%u /m/f
			echo x > /m/new && echo wrote; touch /tmp/y && echo touched`)
		if runtime == "runc" {
			t.Skip("runc before 1.2 ignores the id mappings of mounts, which its handler's probe has to find out")
		}
		in.Namespaces = podNamespaces(t, syscall.SysProcIDMap{ContainerID: 0, HostID: 100000, Size: 65536})
		pinned := in.Namespaces.User
		in = withUserNamespace(in)
		in.Namespaces.User = pinned
		security(in).RunAsUser = nil
		// The daemon shifts the image; the data stay root's and are mapped.
		ids := in.Namespaces.UIDs
		write(t, filepath.Join(bundle, "host", "f"), "")
		in.Config.Mounts = append(in.Config.Mounts,
			&runtimeapi.Mount{ContainerPath: "/m", HostPath: filepath.Join(bundle, "host"), UidMappings: ids, GidMappings: ids})
		if err := os.Chmod(bundle, 0o755); err != nil {
			t.Fatal(err)
		}
		err := filepath.WalkDir(in.Rootfs, func(path string, _ os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(path, 100000, 100000)
		})
		if err != nil {
			t.Fatal(err)
		}
		out, err := runIn(t, runtime, in, bundle)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		wantLines(t, out, "0 100000 65536", "owner=0", "wrote", "touched")
		if strings.Contains(out, "owner=65534") {
			t.Errorf("a mount is not mapped:\n%s", out)
		}
	})
}
