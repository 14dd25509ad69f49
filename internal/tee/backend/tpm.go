package backend

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"cloister.dev/internal/tee"
)

// TPMOptions name the resource.
type TPMOptions struct {
	Resource string
	Limit    int // opens of one TPM
}

// tpm offers opens of the resource-managed TPM devices, each a part. A
// container sees the one that it was given as /dev/tpmrm0.
type tpm struct {
	o TPMOptions
	m tee.Machine
}

func (t *tpm) Name() string { return "tpm" }

func (t *tpm) Scan(context.Context) ([]tee.Resource, error) {
	nodes, err := filepath.Glob(t.m.Path("/dev/tpmrm[0-9]*"))
	if err != nil || len(nodes) == 0 {
		return nil, err
	}
	slices.Sort(nodes)
	r := tee.Resource{Name: t.o.Resource, Model: tee.Count}
	for _, n := range nodes {
		key := strings.TrimPrefix(filepath.Base(n), "tpm")
		p := tee.Part{Key: key, Units: t.o.Limit, Grant: tee.Grant{
			Devices: []tee.Device{{Host: n, Container: "/dev/tpmrm0", Access: "rw"}},
		}}
		numa := t.m.Read("/sys/class/tpm/tpm" + strings.TrimPrefix(key, "rm") + "/device/numa_node")
		if node, err := strconv.ParseInt(numa, 10, 64); err == nil && node >= 0 { // -1 is unknown
			p.NUMA = []int64{node}
		}
		r.Parts = append(r.Parts, p)
	}
	return []tee.Resource{r}, nil
}

func (t *tpm) Health(_ context.Context, found []tee.Resource) []tee.Ailment {
	var all []tee.Ailment
	for _, r := range found {
		for _, p := range r.Parts {
			if err := t.m.CharDevice("/dev/tpm" + p.Key); err != nil {
				all = append(all, tee.Ailment{Resource: r.Name, Part: p.Key, Reason: err.Error()})
			}
		}
	}
	return all
}

func (t *tpm) WatchPaths() []string {
	return []string{t.m.Path("/dev/tpmrm0"), t.m.Path("/dev/tpmrm1")}
}
