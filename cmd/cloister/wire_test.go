package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"cloister.dev/internal/config"
)

func TestStreamingErrorsAreDebug(t *testing.T) {
	for level, want := range map[slog.Level]bool{slog.LevelDebug: true, slog.LevelInfo: false} {
		var out bytes.Buffer
		klog.SetSlogLogger(slog.New(demoted{slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level})}).With("source", "streaming"))
		klog.ErrorS(errors.New("gone"), "client left")
		klog.Flush()
		klog.ClearLogger()
		got := out.String()
		if strings.Contains(got, "client left") != want || strings.Contains(got, "ERROR") {
			t.Errorf("at %v: %q", level, got)
		}
		if want && !strings.Contains(got, "source=streaming") {
			t.Errorf("nobody knows where it comes from: %q", got)
		}
	}
}

func TestCgroupDriverOfFoundHandlers(t *testing.T) {
	dir := t.TempDir()
	for _, program := range []string{"runc", "crun"} {
		if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/false\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	for driver, systemd := range map[string]bool{"": false, "cgroupfs": false, "systemd": true} {
		cfg := config.Config{Cloister: config.Cloister{CgroupDriver: driver, Shim: "/bin/cloister-shim"}}
		o, err := shimOptions(cfg, slog.New(slog.DiscardHandler))
		if err != nil || len(o.Runtimes) != 2 {
			t.Fatalf("%v, %v", o.Runtimes, err)
		}
		for name, r := range o.Runtimes {
			if r.SystemdCgroup != systemd {
				t.Errorf("driver %q: SystemdCgroup of %s is %v", driver, name, r.SystemdCgroup)
			}
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	bind := func(name string) (int, string) {
		path := filepath.Join(dir, name)
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd, path
	}
	_, dead := bind("dead") // bound, and nobody listens
	live, path := bind("live")
	if err := unix.Listen(live, 5); err != nil {
		t.Fatal(err)
	}
	busy, full := bind("busy")
	if err := unix.Listen(busy, 0); err != nil {
		t.Fatal(err)
	}
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: full}); errors.Is(err, unix.EAGAIN) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, refused string }{
		{"absent", filepath.Join(dir, "new", "absent"), ""},
		{"dead", dead, ""},
		{"live", path, "another daemon"},
		{"busy", full, "find out whether"},
		{"no socket", file, "no socket"},
	} {
		before, _ := os.Lstat(tt.path)
		lis, err := listen(t.Context(), "unix://"+tt.path, config.GRPCServer{})
		if tt.refused == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
				continue
			}
			if fi, err := os.Stat(tt.path); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", tt.name, fi, err)
			}
			lis.Close()
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.refused) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if after, err := os.Lstat(tt.path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: what was there is gone: %v", tt.name, err)
		}
	}
}

func TestSocketOfAGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it gives a file away")
	}
	path := filepath.Join(t.TempDir(), "s")
	lis, err := listen(t.Context(), path, config.GRPCServer{UID: 7, GID: 1234})
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != 7 || st.Gid != 1234 || st.Mode&0o777 != 0o660 {
		t.Errorf("the socket is of %d:%d with mode %o: %v", st.Uid, st.Gid, st.Mode, err)
	}
}
