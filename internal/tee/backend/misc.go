package backend

import (
	"context"
	"maps"
	"slices"

	"cloister.dev/internal/tee"
)

// MiscOptions name the resources that lines of misc.capacity become.
type MiscOptions struct {
	Resources map[string]string // key of the line → resource
}

// misc offers what the kernel's misc controller counts: address space ids of
// SEV, key ids of TDX. The virtual machine monitor takes them on the host, so a
// container is given nothing; the count keeps a node from being asked for more
// confidential machines than it can start.
type misc struct {
	name   string
	o      MiscOptions
	m      tee.Machine
	device string // has to be there, if not empty
}

func (c *misc) Name() string { return c.name }

func (c *misc) Scan(context.Context) ([]tee.Resource, error) {
	var found []tee.Resource
	for _, key := range slices.Sorted(maps.Keys(c.o.Resources)) {
		if n, ok := c.m.MiscCapacity(key); ok {
			const most = 1 << 20 // no processor has that many
			found = append(found, tee.Resource{Name: c.o.Resources[key], Model: tee.Count, Parts: []tee.Part{{Units: int(min(n, most))}}})
		}
	}
	return found, nil
}

func (c *misc) Health(_ context.Context, found []tee.Resource) []tee.Ailment {
	if c.device == "" {
		return nil
	}
	if err := c.m.CharDevice(c.device); err != nil {
		return everything(found, err)
	}
	return nil
}

func (c *misc) WatchPaths() []string {
	if c.device == "" {
		return nil
	}
	return []string{c.m.Path(c.device)}
}
