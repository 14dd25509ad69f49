package vm

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOverlayAt(t *testing.T) {
	const list = `22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:40 / /run/a/rootfs rw,relatime shared:3 - overlay overlay rw,lowerdir=/s/3/fs:/s/1/fs,upperdir=/s/9/fs,workdir=/s/9/work,volatile
41 22 0:41 / /run/b/rootfs rw,relatime - overlay overlay rw,lowerdir=3/fs:1/fs,upperdir=9/fs,workdir=9/work
42 22 0:42 / /run/c/rootfs rw,relatime - overlay overlay ro,lowerdir=/s/3/fs:/s/1/fs
43 22 254:0 /s/5 /run/d/rootfs rw,relatime - ext4 /dev/vda rw
44 40 0:44 / /run/e/rootfs rw,relatime - overlay overlay rw,lowerdir=/s/3/fs,upperdir=/s/8/fs,workdir=/s/8/work
45 44 0:45 / /run/e/rootfs rw,relatime - tmpfs tmpfs rw
46 22 0:46 / /run/f/rootfs rw,relatime - overlay overlay rw,lowerdir=/s\040x/3/fs,upperdir=/s/9/fs
cut off
`
	for point, want := range map[string][]string{
		"/run/a/rootfs": {"/s/3/fs", "/s/1/fs"}, // and the only one
		"/run/b/rootfs": nil,                    // its paths are not whole
		"/run/c/rootfs": nil,                    // nothing can be written
		"/run/d/rootfs": nil, "/run/e/rootfs": nil, "/run/f/rootfs": nil, "/run/a": nil, "": nil,
	} {
		o, ok := overlayAt(list, point)
		if ok != (want != nil) || !slices.Equal(o.layers, want) || ok && o.upper != "/s/9/fs" {
			t.Errorf("%q: %+v, %v", point, o, ok)
		}
	}
}

func TestMakeWritable(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := makeWritable(dir); err != nil {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(dir + "/*/*"); len(left) > 0 {
			t.Errorf("left of an earlier start: %v", left)
		}
		if info, err := os.Stat(filepath.Join(dir, upperDir)); err != nil || info.Mode().Perm() != 0o750 {
			t.Errorf("the container's root is %v, %v", info, err)
		}
		if err := os.WriteFile(filepath.Join(dir, upperDir, "written"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMarkOpaque(t *testing.T) {
	dir := t.TempDir()
	hiding, plain := filepath.Join(dir, "a/hiding"), filepath.Join(dir, "plain")
	for _, d := range []string{hiding, plain} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Lsetxattr(hiding, opaque, []byte("y"), 0); err != nil {
		t.Skipf("no such attributes here: %v", err)
	}
	if err := markOpaque(dir); err != nil {
		t.Fatal(err)
	}
	var mark [4]byte
	if n, err := unix.Lgetxattr(hiding, userOpaque, mark[:]); err != nil || string(mark[:n]) != "y" {
		t.Errorf("the folder is marked %q, %v", mark[:max(n, 0)], err)
	}
	if _, err := unix.Lgetxattr(plain, userOpaque, mark[:]); err == nil {
		t.Error("a folder is marked that hides nothing")
	}
}
