package image

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/erofs"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
)

// TestSnapshotters pulls an image for each kind of snapshotter, beside the
// default one, and lets a container write.
func TestSnapshotters(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "lower", []byte("1")), fileLayer(t, "upper", []byte("2"))))
	for name, edit := range map[string]func(*testing.T, *Options){
		snapshotterNative:  func(*testing.T, *Options) {},
		snapshotterOverlay: func(*testing.T, *Options) {},
		snapshotterBtrfs: func(t *testing.T, o *Options) {
			o.Snapshotters = []string{snapshotterBtrfs}
			mountBtrfs(t, filepath.Join(o.Root, "snapshots", snapshotterBtrfs))
		},
		snapshotterErofs: func(t *testing.T, o *Options) {
			needErofs(t, o.Root)
			o.Snapshotters = []string{snapshotterErofs}
		},
		"proxied": func(t *testing.T, o *Options) {
			sn, err := native.NewSnapshotter(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			o.Snapshotters = []string{"proxied"}
			o.ProxySnapshotters = map[string]ProxySnapshotter{"proxied": {Address: serveSnapshotter(t, sn)}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var kept Options
			s := openStore(t, func(o *Options) { edit(t, o); kept = *o })
			img, err := s.Pull(t.Context(), PullRequest{Ref: ref, Snapshotter: name})
			if err != nil {
				t.Fatal(err)
			}
			mounts, err := s.PrepareRootfs(t.Context(), "c", img, RootfsOptions{Snapshotter: name})
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if err := mount.All(mounts, dir); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = mount.UnmountAll(dir, 0) })
			for file, want := range map[string]string{"lower": "1", "upper": "2"} {
				if b, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(b) != want {
					t.Errorf("%s: %q %v", file, b, err)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "written"), []byte("x"), 0o600); err != nil {
				t.Error(err)
			}
			if err := mount.UnmountAll(dir, 0); err != nil {
				t.Error(err)
			}
			if u, err := s.Usage(t.Context()); err != nil || len(u.Snapshots) == 0 {
				t.Errorf("usage %v %v", u, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := Open(t.Context(), kept)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if _, err := again.RootfsMounts(t.Context(), "c"); err != nil {
				t.Errorf("after the daemon's restart: %v", err)
			}
			if err := again.RemoveRootfs(t.Context(), "c"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnknownSnapshotter(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"zfs", "../x", "proxied"} {
		if _, err := Open(t.Context(), Options{Root: t.TempDir(), Snapshotter: name}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "choose one of") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that nobody serves yet does not keep the daemon from starting.
	s := openStore(t, func(o *Options) {
		o.Snapshotters = []string{"later"}
		o.ProxySnapshotters = map[string]ProxySnapshotter{"later": {Address: filepath.Join(t.TempDir(), "later.sock")}}
	})
	r := newRegistry(t)
	ref := r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	mustPull(t, s, ref)
	if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Snapshotter: "later"}); err == nil {
		t.Error("a pull into a snapshotter that does not answer succeeded")
	}
}

// TestRemoteSnapshotter has a snapshotter that fetches layers itself, as stargz
// and nydus do: what it claims to have is not downloaded.
func TestRemoteSnapshotter(t *testing.T) {
	needRoot(t)
	inner, err := native.NewSnapshotter(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	lazy := &lazySnapshotter{Snapshotter: inner}
	address := serveSnapshotter(t, lazy)
	layers := []string{"a", "b"}
	r := newRegistry(t)
	ref := r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, layers[0], noise(t, 100)), fileLayer(t, layers[1], noise(t, 100))))
	s := openStore(t, func(o *Options) {
		o.Snapshotters = []string{"lazy"}
		o.ProxySnapshotters = map[string]ProxySnapshotter{"lazy": {Address: address, Remote: true}}
	})
	r.fault(nil)
	if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Snapshotter: "lazy"}); err != nil {
		t.Fatal(err)
	}
	if len(lazy.refs) != 2 || lazy.refs[0] != ref {
		t.Errorf("the snapshotter was told %v", lazy.refs)
	}
}

// lazySnapshotter notes what it is told, and has every layer already.
type lazySnapshotter struct {
	snapshots.Snapshotter
	refs []string
}

func (l *lazySnapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	target := info.Labels["containerd.io/snapshot.ref"]
	if target == "" {
		return l.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
	l.refs = append(l.refs, info.Labels["containerd.io/snapshot/cri.image-ref"])
	if _, err := l.Snapshotter.Prepare(ctx, key, parent, opts...); err != nil {
		return nil, err
	}
	if err := l.Commit(ctx, target, key, opts...); err != nil {
		return nil, err
	}
	return nil, errdefs.ErrAlreadyExists
}

func serveSnapshotter(t *testing.T, sn snapshots.Snapshotter) (address string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sn")
	if err != nil {
		t.Fatal(err)
	}
	address = filepath.Join(dir, "sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(g, snapshotservice.FromSnapshotter(sn))
	go func() { _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); _ = sn.Close(); _ = os.RemoveAll(dir) })
	return address
}

// needErofs skips where erofs is not, and unmounts layers in the end: they stay
// mounted when a store is closed.
func needErofs(t *testing.T, root string) {
	t.Helper()
	needProgram(t, "mkfs.erofs")
	if !erofs.FindErofs() {
		t.Skip("this kernel has no erofs")
	}
	t.Cleanup(func() {
		dirs, _ := filepath.Glob(filepath.Join(root, "snapshots", snapshotterErofs, "snapshots", "*", "fs"))
		for _, dir := range dirs {
			if err := mount.UnmountAll(dir, 0); err != nil {
				t.Error(err)
			}
		}
	})
}

// mountBtrfs makes a btrfs in a file and mounts it.
func mountBtrfs(t *testing.T, dir string) {
	t.Helper()
	mkfs := needProgram(t, "mkfs.btrfs")
	if b, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(b), "btrfs") {
		t.Skip("this kernel has no btrfs")
	}
	if _, err := openBtrfs(t.TempDir()); err != nil && strings.Contains(err.Error(), "cgo") {
		t.Skip("btrfs is compiled in with cgo alone, as go test -race is:", err)
	}
	file := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command("truncate", "-s", "256M", file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command(mkfs, "-q", file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.btrfs: %v: %s", err, out)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-o", "loop", file, dir).CombinedOutput(); err != nil {
		t.Skipf("loop devices do not work here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
}
