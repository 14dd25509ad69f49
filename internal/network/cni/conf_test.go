package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/network/networktest"
)

const tiny = `{"cniVersion":"1.0.0","name":"%s","plugins":[{"type":"loopback"}]}`

func TestLoadFolder(t *testing.T) {
	type files map[string]string
	for name, c := range map[string]struct {
		files files
		max   int
		want  []string // names of the networks
		err   string
	}{
		"none":            {files{}, 1, nil, ""},
		"other endings":   {files{"10.conflist.bak": "{", "README": "x"}, 1, nil, ""},
		"sorted":          {files{"20-b.conflist": fmt.Sprintf(tiny, "b"), "10-a.conflist": fmt.Sprintf(tiny, "a")}, 0, []string{"a", "b"}, ""},
		"the first":       {files{"20-b.conflist": "{", "10-a.conflist": fmt.Sprintf(tiny, "a")}, 1, []string{"a"}, ""},
		"single":          {files{"10.conf": `{"cniVersion":"0.3.1","name":"s","type":"bridge"}`}, 1, []string{"s"}, ""},
		"single, json":    {files{"10.json": `{"cniVersion":"0.3.1","name":"s","type":"bridge"}`}, 1, []string{"s"}, ""},
		"cut off":         {files{"10.conflist": `{"name":"a","plug`}, 1, nil, "10.conflist"},
		"no plugins":      {files{"10.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[]}`}, 1, nil, "no plugins"},
		"no name":         {files{"10.conflist": `{"cniVersion":"1.0.0","plugins":[{"type":"x"}]}`}, 1, nil, "name"},
		"name with slash": {files{"10.conflist": fmt.Sprintf(tiny, "../x")}, 1, nil, "name"},
		"type with slash": {files{"10.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../sh"}]}`}, 1, nil, "slash"},
		"list as conf":    {files{"10.conf": fmt.Sprintf(tiny, "a")}, 1, nil, ".conflist"},
		"beside": {files{
			"10.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"loopback"}]}`,
			"a/5.conf":    `{"type":"tuning"}`,
		}, 1, []string{"a"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for f, data := range c.files {
				write(t, filepath.Join(dir, f), data, 0o644)
			}
			networks, err := loadFolder(dir, c.max)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want one with %q", err, c.err)
				}
				return
			}
			var got []string
			for i, n := range networks {
				got = append(got, n.list.Name)
				if want := fmt.Sprintf("eth%d", i); n.ifName != want {
					t.Errorf("interface %s, want %s", n.ifName, want)
				}
				// What is kept for DEL must stand alone.
				again, err := parseConf(n.raw, true)
				if err != nil || len(again.Plugins) != len(n.list.Plugins) || again.Name != n.list.Name {
					t.Errorf("%s read again: %v", n.raw, err)
				}
			}
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("networks %v, %v; want %v", got, err, c.want)
			}
		})
	}
}

// eventually waits for a change that the watcher brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatal("never:", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestReload(t *testing.T) {
	networktest.RequireNode(t)
	base := t.TempDir()
	dir := filepath.Join(base, "etc", "cni")
	a := start(t, dir, func(o *Options) { o.MaxConfNum = 1; o.StateDir = filepath.Join(base, "state") })
	defer shut(t, a)
	err := a.Ready()
	if err == nil || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "cni config not found in "+confDir(dir)) || !strings.Contains(err.Error(), "builtin") {
		t.Fatalf("ready without a folder: %v", err)
	}
	loaded := func(names ...string) func() bool {
		return func() bool {
			var got []string
			for _, n := range a.Networks() {
				got = append(got, filepath.Base(n))
			}
			return slices.Equal(got, names)
		}
	}
	write(t, filepath.Join(confDir(dir), "20.conflist"), fmt.Sprintf(tiny, "b"), 0o644)
	eventually(t, "the folder appears", loaded("20.conflist"))
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(tiny, "a"), 0o644)
	eventually(t, "an earlier file appears", loaded("10.conflist"))

	write(t, filepath.Join(confDir(dir), "10.conflist"), "{", 0o644)
	eventually(t, "a broken file is noticed", func() bool { return a.LoadError() != nil })
	if !strings.Contains(a.LoadError().Error(), "10.conflist") {
		t.Errorf("load error %v does not name the file", a.LoadError())
	}
	if !loaded("10.conflist")() || a.Ready() != nil {
		t.Errorf("a broken file took what was in force away: %v, %v", a.Networks(), a.Ready())
	}

	if err := os.Rename(confDir(dir), confDir(dir)+".old"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the folder disappears", loaded())
	if a.Ready() == nil {
		t.Error("ready without a folder")
	}
	write(t, filepath.Join(confDir(dir), "30.conflist"), fmt.Sprintf(tiny, "c"), 0o644)
	eventually(t, "the folder comes again", loaded("30.conflist"))
}

func TestReadyNeedsPrograms(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"cluster-net"}]}`, 0o644)
	a := start(t, dir)
	defer shut(t, a)
	if err := a.Ready(); err == nil || !strings.Contains(err.Error(), "cluster-net") || !strings.Contains(err.Error(), binDir(dir)) {
		t.Errorf("ready: %v, want an error that names program and folder", err)
	}
	write(t, filepath.Join(binDir(dir), "cluster-net"), "#!/bin/sh\n", 0o755)
	if err := a.Ready(); err != nil {
		t.Errorf("ready: %v", err)
	}
}

func FuzzParseConf(f *testing.F) {
	f.Add([]byte(fmt.Sprintf(bridgeList, "/tmp", "1.0.0")), true)
	f.Add([]byte(fmt.Sprintf(everyList, "/tmp", "0.3.0")), true)
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"s","type":"bridge","ipam":{"type":"host-local"}}`), false)
	f.Add([]byte(`{"cniVersions":["1.0.0",7],"name":"s","plugins":null}`), true)
	f.Fuzz(func(t *testing.T, data []byte, isList bool) {
		list, err := parseConf(data, isList)
		if err != nil {
			return
		}
		if _, err := inlined(list); err != nil {
			t.Errorf("%s cannot be kept: %v", data, err)
		}
		pluginTypes([]confNetwork{{list: list}})
	})
}
