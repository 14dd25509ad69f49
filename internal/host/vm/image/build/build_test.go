package build

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cloister.dev/internal/host/vm/image"
)

// agent builds a static program to stand in for cloister-agent.
func agent(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, []byte("package main\nfunc main() {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, "agent"), src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return filepath.Join(dir, "agent")
}

// TestBuild makes the same guest twice out of a real kernel package and
// compares every byte.
func TestBuild(t *testing.T) {
	for _, tool := range []string{"apt-get", "dpkg-deb", "crun"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not here", tool)
		}
	}
	root := t.TempDir()
	o := Options{Root: root, Agent: agent(t), Cache: cache(t), ExtraModules: []string{"xfs"}}
	first, err := Guest(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if first.Name != image.DefaultName || !strings.HasPrefix(first.KernelSource, "linux-image-"+first.KernelVersion) || first.Size < 1<<20 {
		t.Errorf("%+v", first.Manifest)
	}
	read := func(g image.Guest) [2][]byte {
		kernel, kerr := os.ReadFile(g.Kernel)
		initrd, ierr := os.ReadFile(g.Initrd)
		if kerr != nil || ierr != nil {
			t.Fatal(kerr, ierr)
		}
		return [2][]byte{kernel, initrd}
	}
	one := read(first)
	if !hasPVH(one[0]) {
		t.Error("the kernel was not unpacked into the form that boots fastest")
	}
	contents(t, one[1])
	second, err := Guest(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if two := read(second); !bytes.Equal(one[0], two[0]) || !bytes.Equal(one[1], two[1]) || first.Digest != second.Digest {
		t.Error("the same inputs gave other bytes")
	}
	all, err := image.List(root)
	if err != nil || len(all) != 1 {
		t.Errorf("guests: %+v %v", all, err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// cache keeps the package between tests of the project.
func cache(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../../../../.cache/guests/packages")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// fileIn gives a file of an archive.
func fileIn(t *testing.T, initrd []byte, path string) []byte {
	t.Helper()
	const header, sizeAt = 110, 54
	at := bytes.Index(initrd, []byte(strings.TrimPrefix(path, "/")+"\x00"))
	if at < header {
		t.Fatalf("the initial file system has no %s", path)
	}
	size, err := strconv.ParseUint(string(initrd[at-header+sizeAt:][:8]), 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	data := initrd[at-header+(header+len(path)+3)/4*4:]
	return data[:size]
}

// contents checks what the agent will find.
func contents(t *testing.T, initrd []byte) {
	t.Helper()
	var c image.Contents
	if err := json.Unmarshal(fileIn(t, initrd, image.ContentsPath), &c); err != nil {
		t.Fatal(err)
	}
	for kind, first := range map[string]string{"microvm": "virtio_mmio.ko", "q35": "virtio_pci.ko"} {
		paths := strings.Fields(string(fileIn(t, initrd, image.BootPath(kind))))
		at := func(name string) int {
			return slices.IndexFunc(paths, func(p string) bool { return strings.HasSuffix(p, "/"+name) })
		}
		if at(first) < 0 || at("virtio_ring.ko") < 0 || at("virtio_ring.ko") > at("virtio.ko") || at("virtio.ko") > at(first) {
			t.Errorf("%s loads its modules in the order %v", kind, paths)
		}
	}
	if files := c.Find("virtiofs"); len(files) < 2 || !strings.HasSuffix(files[0], "/fuse.ko") || !strings.HasSuffix(files[len(files)-1], "/virtiofs.ko") {
		t.Errorf("virtiofs is loaded by %v", files)
	}
	if m := c.Modules["xfs"]; m.Path == "" {
		t.Error("the extra module is not there")
	}
	if bytes.Contains(initrd, []byte("~Module signature appended~")) {
		t.Error("a module kept its signature")
	}
}

func TestBadInput(t *testing.T) {
	good := agent(t)
	dir := t.TempDir()
	junk := filepath.Join(dir, "junk")
	if err := os.WriteFile(junk, bytes.Repeat([]byte("junk"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    Options
		says string
	}{
		"name":              {Options{Name: "../up"}, "../up"},
		"kernel alone":      {Options{Kernel: junk}, "modules"},
		"kernel is junk":    {Options{Kernel: junk, Modules: dir}, "bzImage"},
		"no kernel":         {Options{Kernel: "/nowhere/kernel", Modules: dir}, "/nowhere/kernel"},
		"no such package":   {Options{Package: "linux-image-of-nobody"}, "linux-image-of-nobody"},
		"agent not a file":  {Options{Agent: "/nowhere/agent"}, "/nowhere"},
		"runtime not there": {Options{Runtime: "crun-of-nobody"}, "crun-of-nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Root = filepath.Join(dir, "guests")
			if c.o.Agent == "" {
				c.o.Agent = good
			}
			if c.o.Kernel == "" && c.o.Package == "" && c.o.Name == "" {
				c.o.Kernel, c.o.Modules = fakeKernel(t, dir), dir
			}
			_, err := Guest(t.Context(), c.o)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error does not say %q: %v", c.says, err)
			}
			if left, _ := os.ReadDir(c.o.Root); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// fakeKernel is an ELF file and nothing else.
func fakeKernel(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(path, append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 64)...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// FuzzKernel: a kernel file may be anything.
func FuzzKernel(f *testing.F) {
	image := make([]byte, 4096)
	copy(image[magicAt:], "HdrS")
	image[payloadOffset], image[payloadLength+1] = 16, 1
	f.Add(image)
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = bootable(b)
		_ = hasPVH(b)
		_, _, _ = moduleInfo(b)
		_ = unsigned(b)
	})
}
