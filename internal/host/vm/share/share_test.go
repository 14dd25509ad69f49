package share_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
	"cloister.dev/internal/host/vm/vmtest"
)

func mounts(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestShare(t *testing.T) {
	c := vmtest.Config(t, machine.Microvm)
	program, r := vmtest.Virtiofsd(t), vmtest.Reaper(t)
	dir, src := vmtest.Dir(t), t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("file", "one")
	f, err := share.Start(t.Context(), r, share.Config{Program: program, Dir: dir, Cache: "never"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Stop(context.Background()) })
	c.Shares = []machine.Share{{Tag: share.Tag, Socket: f.Socket()}}
	s := vmtest.Boot(t, r, c)
	s.Must("mount", "virtiofs", share.Tag, "/mnt")
	before := mounts(t)
	for name, o := range map[string]share.Options{"rw": {}, "ro/deep": {ReadOnly: true}} {
		if err := f.Add(name, src, o); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Add("single", filepath.Join(src, "file"), share.Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := f.Add("rw", src, share.Options{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a name twice: %v", err)
	}
	if mounts(t) != before {
		t.Error("the host's mount table has changed")
	}
	for _, path := range []string{"/mnt/rw/file", "/mnt/ro/deep/file", "/mnt/single"} {
		if got := s.Must("read", path); got != "one" {
			t.Errorf("%s holds %q", path, got)
		}
	}
	// What changes on the host changes in the guest.
	write("file", "two")
	if got := s.Must("read", "/mnt/ro/deep/file"); got != "two" {
		t.Errorf("after a change the guest reads %q", got)
	}
	s.Must("write", "/mnt/rw/fresh", "from the guest")
	if b, err := os.ReadFile(filepath.Join(src, "fresh")); err != nil || string(b) != "from the guest" {
		t.Errorf("the host reads %q %v", b, err)
	}
	hostile(t, s, src)

	if err := f.Remove("rw"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Do("read", "/mnt/rw/file"); err == nil {
		t.Error("the guest reads what is no longer shared")
	}
	if err := f.Remove("rw"); err != nil {
		t.Error("remove an absent name:", err)
	}
	if err := f.Add("rw", src, share.Options{}); err != nil {
		t.Error("share a removed name again:", err)
	}
	again := share.Attach(r, f.State())
	if err := again.Remove("ro"); err != nil {
		t.Error(err)
	}
	if _, err := s.Do("read", "/mnt/ro/deep/file"); err == nil {
		t.Error("the guest reads what is no longer shared")
	}
	if err := s.Machine.Kill(context.Background()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-again.Done():
	case <-time.After(10 * time.Second):
		t.Error("virtiofsd outlives its machine")
	}
	for range 2 {
		if err := again.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if b, err := os.ReadFile(filepath.Join(src, "file")); err != nil || string(b) != "two" {
		t.Errorf("the source suffered: %q %v", b, err)
	}
}

// hostile does in the guest what must not work.
func hostile(t *testing.T, s *vmtest.Session, src string) {
	for _, try := range [][]string{
		{"write", "/mnt/ro/deep/file", "x"},
		{"write", "/mnt/ro/deep/new", "x"},
		{"write", "/mnt/single", "x"},
		{"remove", "/mnt/ro/deep/file"},
	} {
		if out, err := s.Do(try[0], try[1:]...); err == nil || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("%v: %q %v", try, out, err)
		}
	}
	outside := filepath.Join(filepath.Dir(src), "outside")
	if err := os.WriteFile(outside, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	// A link is the guest's to follow, in the guest.
	if err := os.Symlink(outside, filepath.Join(src, "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/mnt/rw/link", "/mnt/rw/../../outside", "/mnt/../outside"} {
		if out, err := s.Do("read", path); err == nil {
			t.Errorf("%s gives %q", path, out)
		}
	}
	// A device file that the guest makes on the share is none on the host.
	s.Must("mknod", "/mnt/rw/null", "1", "3")
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(src, "null"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		t.Errorf("mknod went elsewhere: %v", err)
	}
}

func TestBadInput(t *testing.T) {
	r := vmtest.Reaper(t)
	program := vmtest.Virtiofsd(t)
	for says, c := range map[string]share.Config{
		"virtio_fs_daemon": {Program: "/nowhere/virtiofsd"},
		"sometimes":        {Program: program, Cache: "sometimes"},
	} {
		c.Dir = vmtest.Dir(t)
		f, err := share.Start(t.Context(), r, c)
		if err == nil {
			f.Stop(context.Background())
			t.Fatalf("%+v started", c)
		}
		if !strings.Contains(err.Error(), says) {
			t.Errorf("the error does not say %q: %v", says, err)
		}
		if left, _ := os.ReadDir(c.Dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	dir := vmtest.Dir(t)
	f, err := share.Start(t.Context(), r, share.Config{Program: program, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", ".", "..", "../x", "/abs", "a/../b", "a//b"} {
		if err := f.Add(name, "/etc", share.Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if err := f.Add("x", "/nowhere/at/all", share.Options{}); err == nil || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("an absent source: %v", err)
	}
	// As after a crash that left nothing but the folder.
	if err := share.Attach(r, share.State{Dir: dir}).Stop(t.Context()); err != nil {
		t.Error(err)
	}
	select {
	case <-f.Done():
	case <-time.After(10 * time.Second):
		t.Error("virtiofsd stays although nobody will connect any more")
		f.Stop(context.Background())
	}
}
