package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/network/networktest"
)

const dualTemplate = `{"cniVersion":"1.0.0","name":"templ","plugins":[{"type":"bridge","bridge":"cltest5","isGateway":true,
"ipam":{"type":"host-local","dataDir":%q,
"ranges":[{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
"routes":[{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]}}]}`

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// TestTemplate attaches a pod to the network that a template makes once the
// node's ranges are known.
func TestTemplate(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "net.tmpl")
	write(t, file, fmt.Sprintf(dualTemplate, filepath.Join(dir, "ipam")), 0o644)
	a := start(t, dir, func(o *Options) { o.ConfTemplate = file })
	defer shut(t, a)
	if a.Ready() == nil {
		t.Fatal("ready before the ranges are known")
	}
	if err := a.SetPodRanges(prefixes("10.219.0.0/24", "fd13:44::/64")); err != nil {
		t.Fatal(err)
	}
	if err := a.Ready(); err != nil {
		t.Fatal(err)
	}
	ctx, r := deadline(t), newPod(t, "templ")
	res, err := a.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.IPs) != 2 || !prefixes("10.219.0.0/24")[0].Contains(res.IPs[0]) || !prefixes("fd13:44::/64")[0].Contains(res.IPs[1]) {
		t.Errorf("addresses %v, want one of each range", res.IPs)
	}
	if err := a.Detach(ctx, r); err != nil {
		t.Error(err)
	}
	// The node's ranges change: the file is ours, so it changes too.
	if err := a.SetPodRanges(prefixes("10.220.0.0/24")); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(confDir(dir), templateFile))
	if err != nil || !strings.Contains(string(data), "10.220.0.0/24") || strings.Contains(string(data), "::/0") {
		t.Errorf("file %s, %v", data, err)
	}
}

func TestTemplateGivesWay(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "net.tmpl")
	write(t, file, fmt.Sprintf(dualTemplate, filepath.Join(dir, "ipam")), 0o644)
	write(t, filepath.Join(confDir(dir), "20-own.conflist"), fmt.Sprintf(tiny, "own"), 0o644)
	a := start(t, dir, func(o *Options) { o.ConfTemplate = file })
	defer shut(t, a)
	if err := a.SetPodRanges(prefixes("10.219.0.0/24")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(confDir(dir), templateFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made beside somebody else's: %v", err)
	}
}

func TestRenderTemplate(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		text, want string
		kind       error
	}{
		"values":       {`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","a":"{{.PodCIDR}}","b":"{{index .PodCIDRRanges 1}}","c":"{{.Routes}}"}]}`, `"a":"10.1.0.0/16","b":"fd00::/64","c":"[0.0.0.0/0 ::/0]"`, nil},
		"unknown":      {`{{.PodCidr}}`, "PodCidr", errdefs.ErrInvalidArgument},
		"not closed":   {`{{.PodCIDR`, "unclosed action", errdefs.ErrInvalidArgument},
		"no JSON":      {`{{.PodCIDR}}`, "no network configuration", errdefs.ErrInvalidArgument},
		"no plugins":   {`{"cniVersion":"1.0.0","name":"n","plugins":[]}`, "no plugins", errdefs.ErrInvalidArgument},
		"endless":      {`{{range $i := .Routes}}{{printf "%2000000d" 1}}{{end}}`, "more than", errdefs.ErrInvalidArgument},
		"not there":    {"", "no such file", errdefs.ErrNotFound},
		"slashed name": {`{"cniVersion":"1.0.0","name":"../n","plugins":[{"type":"x"}]}`, "name", errdefs.ErrInvalidArgument},
	} {
		file := filepath.Join(dir, name)
		if c.text != "" {
			write(t, file, c.text, 0o644)
		}
		data, err := renderTemplate(file, prefixes("10.1.0.0/16", "fd00::/64"))
		if c.kind == nil && (err != nil || !strings.Contains(string(data), c.want)) {
			t.Errorf("%s: %s, %v", name, data, err)
		}
		if c.kind != nil && (!errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.kind, c.want)
		}
	}
}

// TestHandlerFolder gives the pods of one runtime handler networks of their own.
func TestHandlerFolder(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
	own := filepath.Join(dir, "vm")
	for i, name := range []string{"first", "second", "third"} {
		write(t, filepath.Join(own, fmt.Sprintf("%d.conf", i)), fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"type":"bridge","bridge":"cltest%d",
			"isGateway":true,"ipam":{"type":"host-local","dataDir":"%s/ipam","subnet":"10.22%d.0.0/24"}}`, name, 6+i, dir, i+1), 0o644)
	}
	a := start(t, dir, func(o *Options) {
		o.Handlers = map[string]Folder{"vm": {Dir: own, MaxConfNum: 2}, "none": {Dir: filepath.Join(dir, "none")}}
	})
	defer shut(t, a)
	ctx := deadline(t)
	for handler, want := range map[string]string{"": "10.214.0.0/16", "runc": "10.214.0.0/16", "vm": "10.221.0.0/24"} {
		r := newPod(t, "pod"+handler)
		r.Handler = handler
		res, err := a.Attach(ctx, r)
		if err != nil {
			t.Fatalf("handler %q: %v", handler, err)
		}
		if !netip.MustParsePrefix(want).Contains(res.IPs[0]) {
			t.Errorf("handler %q: address %s, want one of %s", handler, res.IPs[0], want)
		}
		r.Handler = "" // the record of the attachment knows better
		if err := a.Detach(ctx, r); err != nil {
			t.Errorf("handler %q: %v", handler, err)
		}
	}
	if got := a.Networks(); !slices.Equal(got, []string{filepath.Join(confDir(dir), "10.conflist"), filepath.Join(own, "0.conf"), filepath.Join(own, "1.conf")}) {
		t.Errorf("in force: %v", got)
	}
	r := newPod(t, "lost")
	r.Handler = "none"
	if _, err := a.Attach(ctx, r); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), filepath.Join(dir, "none")) {
		t.Errorf("handler without files: %v", err)
	}
}
