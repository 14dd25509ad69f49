package tee

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Model says how a resource is counted.
type Model string

// The models. Units of Count and Memory are handed out one by one; Bytes is a
// figure that the scheduler reckons with and that nothing is handed out of.
const (
	Count  Model = "count"
	Memory Model = "memory"
	Bytes  Model = "bytes"
)

// Resource is something that containers can ask for by name.
type Resource struct {
	// Name is an extended resource name of Kubernetes, DOMAIN/NAME.
	Name  string `json:"name"`
	Model Model  `json:"model"`
	// UnitKiB is the size of a unit of Memory.
	UnitKiB int64  `json:"unitKiB,omitempty"`
	Parts   []Part `json:"parts"`
}

// Part is what of a resource fails and recovers as one.
type Part struct {
	// Key names the part among those of its resource, and begins the ids of its
	// units. It may be empty when there is only one part.
	Key string `json:"key,omitempty"`
	// Units is how many there are.
	Units int `json:"units"`
	// Bytes is the size of a part of the model Bytes.
	Bytes int64 `json:"bytes,omitempty"`
	// NUMA lists the NUMA nodes that the part belongs to; empty is unknown.
	NUMA []int64 `json:"numa,omitempty"`
	// Grant is what a container with a unit of the part is given.
	Grant Grant `json:"grant"`
}

// Grant is what a container is given.
type Grant struct {
	Devices []Device          `json:"devices,omitempty"`
	Mounts  []Mount           `json:"mounts,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
}

// Device is a device node of the host.
type Device struct {
	Host      string `json:"host"`
	Container string `json:"container"`
	// Access holds r, w and m, as in a cgroup.
	Access string `json:"access"`
}

// Mount is a folder or file of the host.
type Mount struct {
	Host      string `json:"host"`
	Container string `json:"container"`
	ReadOnly  bool   `json:"readOnly"`
}

// idBase keeps the ids of 220,000 units at four bytes: all of them travel to
// kubelet in one message of bounded size.
const idBase = 36

// maxUnits of a part are more than any machine has, and few enough to reckon
// with. What a vendor's library tells may be anything.
const maxUnits = math.MaxInt32

// ID is the id of the n-th unit.
func (p Part) ID(n int) string {
	id := strconv.FormatInt(int64(n), idBase)
	if p.Key == "" {
		return id
	}
	return p.Key + "." + id
}

// Units is how many units all parts have.
func (r Resource) Units() int {
	n := 0
	for _, p := range r.Parts {
		n += p.Units
	}
	return n
}

// Find gives the index of the part that a unit belongs to, and its number there.
func (r Resource) Find(id string) (part, unit int, ok bool) {
	key, number := "", id
	if i := strings.LastIndexByte(id, '.'); i >= 0 {
		key, number = id[:i], id[i+1:]
	}
	for i, p := range r.Parts {
		if p.Key != key {
			continue
		}
		n, err := strconv.ParseInt(number, idBase, 32)
		return i, int(n), err == nil && n >= 0 && n < int64(p.Units) && p.ID(int(n)) == id
	}
	return 0, 0, false
}

// check judges what a backend found.
func (r Resource) check() error {
	domain, name, ok := strings.Cut(r.Name, "/")
	if !ok || domain == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("resource name %q is not DOMAIN/NAME: %w", r.Name, errdefs.ErrInvalidArgument)
	}
	keys := map[string]bool{}
	for _, p := range r.Parts {
		if keys[p.Key] || p.Key == "" && len(r.Parts) > 1 || strings.ContainsAny(p.Key, "./ ") || len(p.Key) > 32 {
			return fmt.Errorf("resource %s: bad key %q of a part: %w", r.Name, p.Key, errdefs.ErrInvalidArgument)
		}
		keys[p.Key] = true
		if p.Units < 0 || p.Bytes < 0 {
			return fmt.Errorf("resource %s: part %q has less than nothing: %w", r.Name, p.Key, errdefs.ErrInvalidArgument)
		}
		if p.Units > maxUnits {
			return fmt.Errorf("resource %s: part %q has %d units, which cannot be: %w", r.Name, p.Key, p.Units, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// merge adds what another part gives; of two for the same path the first stays.
func (g *Grant) merge(other Grant) {
	for _, d := range other.Devices {
		if !hasDevice(g.Devices, d.Container) {
			g.Devices = append(g.Devices, d)
		}
	}
	for _, m := range other.Mounts {
		if !hasMount(g.Mounts, m.Container) {
			g.Mounts = append(g.Mounts, m)
		}
	}
	for k, v := range other.Env {
		if g.Env == nil {
			g.Env = map[string]string{}
		}
		if _, ok := g.Env[k]; !ok {
			g.Env[k] = v
		}
	}
}

func hasDevice(all []Device, path string) bool {
	for _, d := range all {
		if d.Container == path {
			return true
		}
	}
	return false
}

func hasMount(all []Mount, path string) bool {
	for _, m := range all {
		if m.Container == path {
			return true
		}
	}
	return false
}
