// Package image keeps guests: a kernel, and an initial file system with
// cloister-agent as its first program, crun with its libraries, and the kernel
// modules that a guest needs. It promises that a guest appears under its name
// as a whole or not at all.
//
// It knows nothing of machines, a guest is files; nor how these are made, which
// is package build's: an agent in the guest has no use for that.
package image

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// DefaultName is the guest that handlers boot which name none.
const DefaultName = "default"

// Guest is a guest on disk.
type Guest struct {
	Name     string `json:"name"`
	Dir      string `json:"dir"`
	Kernel   string `json:"kernel"` // path
	Initrd   string `json:"initrd"` // path
	Manifest `json:"manifest"`
}

// Manifest tells what a guest was made of. It is stored beside it.
type Manifest struct {
	KernelVersion string   `json:"kernelVersion"` // what uname -r says in it
	KernelSource  string   `json:"kernelSource"`  // a package with its version, or a path
	Agent         string   `json:"agent"`         // version of cloister-agent
	Runtime       string   `json:"runtime"`       // version of crun
	Digest        string   `json:"digest"`        // of kernel and initrd
	Size          int64    `json:"size"`          // bytes of both
	Modules       []string `json:"modules"`
	// Built is when, by the time of the file: it is no part of what was built.
	Built time.Time `json:"-"`
}

// ContentsPath is where the initial file system describes itself to the agent,
// as JSON of Contents.
const ContentsPath = "/etc/cloister/guest.json"

// BarePath is a program in the initial file system that says BareMark on the
// console and ends: with rdinit=BarePath a machine boots the guest's kernel and
// nothing else, which proves and measures that much.
const (
	BarePath = "/bare"
	BareMark = "cloister: the kernel is up"
)

// BootPath is where the initial file system lists the module files that a
// machine of a type ("microvm", "q35") loads before anything else works: one
// path a line, in this order. It is not part of Contents because a machine's
// start waits for it, and would for all of that to be decoded.
func BootPath(machine string) string { return "/etc/cloister/boot-" + machine }

// Contents is what the agent in the guest is told of its own file system.
type Contents struct {
	Kernel string `json:"kernel"`
	// Modules are all modules by name.
	Modules map[string]Module `json:"modules"`
	Runtime string            `json:"runtime"` // path of crun
}

// Module is a kernel module.
type Module struct {
	Path  string   `json:"path"`
	Needs []string `json:"needs,omitempty"` // names, in the order to load them before this one
	// Aliases are other names by which the kernel asks for it.
	Aliases []string `json:"aliases,omitempty"`
}

// Find gives the files to load, in order, for a module that the kernel calls
// by its name or an alias; none when the guest has no such module.
func (c Contents) Find(name string) []string {
	plain := strings.ReplaceAll(name, "-", "_")
	m, ok := c.Modules[plain]
	if !ok {
		for _, n := range slices.Sorted(maps.Keys(c.Modules)) {
			if slices.Contains(c.Modules[n].Aliases, name) {
				m, ok = c.Modules[n], true
				break
			}
		}
	}
	if !ok {
		return nil
	}
	var files []string
	for _, n := range m.Needs {
		files = append(files, c.Modules[n].Path)
	}
	return append(files, m.Path)
}

// Open gives the guest called name; errdefs.ErrNotFound tells how to build it.
func Open(root, name string) (Guest, error) { return open(root, name) }

// List gives all guests by name.
func List(root string) ([]Guest, error) { return list(root) }
