package cni

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"text/template"

	"github.com/containerd/errdefs"
)

// templateFile is what is made of the template: containerd's name of it, so
// that both find the same file.
const templateFile = "10-containerd-net.conflist"

// templateValues are what the template may name.
type templateValues struct {
	PodCIDR       string
	PodCIDRRanges []string
	Routes        []string
}

// SetPodRanges takes the node's pod ranges, the first being primary, and makes
// the configuration file of the template, if there is one. Files that somebody
// else put into the folder win: then none is made.
func (a *Attacher) SetPodRanges(ranges []netip.Prefix) error {
	if len(ranges) == 0 {
		return nil
	}
	a.ranges.mu.Lock()
	defer a.ranges.mu.Unlock()
	a.ranges.last = ranges
	return a.render(ranges)
}

// podRanges are what kubelet told last.
type podRanges struct {
	mu   sync.Mutex // held while a file is written
	last []netip.Prefix
}

// renderAgain makes the file of a template that has changed.
func (a *Attacher) renderAgain() error {
	a.ranges.mu.Lock()
	defer a.ranges.mu.Unlock()
	if len(a.ranges.last) == 0 {
		return nil
	}
	return a.render(a.ranges.last)
}

func (a *Attacher) render(ranges []netip.Prefix) error {
	set := a.now.Load()
	if set.o.ConfTemplate == "" {
		return nil
	}
	files, err := confFiles(set.main.Dir)
	if err != nil {
		return fmt.Errorf("read cni config folder: %w", err)
	}
	path := filepath.Join(set.main.Dir, templateFile)
	for _, f := range files {
		if f != path {
			a.log.Debug("the cni template is not used: the folder has files already", "file", f)
			return nil
		}
	}
	data, err := renderTemplate(set.o.ConfTemplate, ranges)
	if err != nil {
		return fmt.Errorf("conf_template %s: %w", set.o.ConfTemplate, err)
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := writeConf(path, data); err != nil {
		return err
	}
	a.log.Info("cni config made of the template", "file", path, "ranges", ranges)
	set.main.reload()
	return nil
}

// renderTemplate refuses what could not be loaded from the folder afterwards.
func renderTemplate(file string, ranges []netip.Prefix) ([]byte, error) {
	t, err := template.New(filepath.Base(file)).Option("missingkey=error").ParseFiles(file)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, kindOf(err))
	}
	values := templateValues{PodCIDR: ranges[0].String()}
	routes := map[bool]string{true: "0.0.0.0/0", false: "::/0"}
	families := map[bool]bool{}
	for _, r := range ranges {
		values.PodCIDRRanges = append(values.PodCIDRRanges, r.String())
		families[r.Addr().Is4()] = true
	}
	for _, v4 := range []bool{true, false} {
		if families[v4] {
			values.Routes = append(values.Routes, routes[v4])
		}
	}
	out := &bounded{}
	if err := t.Execute(out, values); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	list, err := parseConf(out.Bytes(), true)
	if err != nil {
		return nil, fmt.Errorf("what it makes is no network configuration: %w", err)
	}
	if len(list.Plugins) == 0 {
		return nil, fmt.Errorf("what it makes has no plugins: %w", errdefs.ErrInvalidArgument)
	}
	return out.Bytes(), nil
}

func kindOf(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errdefs.ErrNotFound
	}
	return errdefs.ErrInvalidArgument
}

// bounded keeps a template that loops from filling memory.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxConfSize {
		return 0, fmt.Errorf("it makes more than %d bytes", maxConfSize)
	}
	return b.Buffer.Write(p)
}

// writeConf puts a file into the folder that is there as a whole or not at all;
// until then its name has an ending that nobody reads.
func writeConf(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make the cni config folder: %w", err)
	}
	fresh := path + ".new"
	err := os.WriteFile(fresh, data, 0o644)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return fmt.Errorf("write cni config: %w", errors.Join(err, os.Remove(fresh)))
	}
	return nil
}
