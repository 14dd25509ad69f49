package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
