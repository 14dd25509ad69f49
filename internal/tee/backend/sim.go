package backend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee"
)

// SimOptions describe a TEE that is not there.
type SimOptions struct {
	Resource     string
	PrecisionKiB int64
	MemoryKiB    int64
	Nodes        int // NUMA nodes that the memory is spread over
	// FaultFile makes it unhealthy while it is there. Its text is the reason, or
	// lines "PART: reason" for single parts.
	FaultFile string
	// Devices and Folders are given to containers, so that a demonstration shows some.
	Devices []string
	Folders []string
}

// sim offers memory of a TEE that does not exist, for tests and
// demonstrations. It protects nothing, so it never reports under the name of
// something that does.
type sim struct{ o SimOptions }

// SimDomain is the domain that all resources of sim are in.
const SimDomain = "cloister.sim/"

func (s *sim) Name() string { return "sim" }

func (s *sim) Scan(context.Context) ([]tee.Resource, error) {
	if !strings.HasPrefix(s.o.Resource, SimDomain) {
		return nil, fmt.Errorf("resource %q: a simulated resource is called %sNAME, so that nobody takes it for a real one: %w",
			s.o.Resource, SimDomain, errdefs.ErrInvalidArgument)
	}
	r := tee.Resource{Name: s.o.Resource, Model: tee.Memory, UnitKiB: s.o.PrecisionKiB}
	grant := tee.Grant{Devices: devices(tee.Machine{}, s.o.Devices...), Env: map[string]string{"CLOISTER_TEE": "sim"}}
	for _, f := range s.o.Folders {
		grant.Mounts = append(grant.Mounts, tee.Mount{Host: f, Container: f, ReadOnly: true})
	}
	units, nodes := int(s.o.MemoryKiB/s.o.PrecisionKiB), max(s.o.Nodes, 1)
	for n := range nodes {
		p := tee.Part{Units: units / nodes, Grant: grant}
		if nodes > 1 {
			p.Key, p.NUMA = fmt.Sprintf("node%d", n), []int64{int64(n)}
		}
		r.Parts = append(r.Parts, p)
	}
	return []tee.Resource{r}, nil
}

// maxFaultFile bounds what is read of FaultFile.
const maxFaultFile = 4096

func (s *sim) Health(_ context.Context, found []tee.Resource) []tee.Ailment {
	if s.o.FaultFile == "" {
		return nil
	}
	b, err := os.ReadFile(s.o.FaultFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return everything(found, err)
	}
	text := strings.TrimSpace(string(b[:min(len(b), maxFaultFile)]))
	if text == "" {
		text = "told to be"
	}
	var all []tee.Ailment
	for line := range strings.Lines(text) {
		part, reason, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if ok && strings.HasPrefix(part, "node") {
			all = append(all, tee.Ailment{Resource: s.o.Resource, Part: part, Reason: reason})
		}
	}
	if len(all) == 0 {
		return everything(found, errors.New(text))
	}
	return all
}

func (s *sim) WatchPaths() []string {
	if s.o.FaultFile == "" {
		return nil
	}
	return []string{s.o.FaultFile}
}
