package backend

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"cloister.dev/internal/tee"
)

// SGXOptions name the resources as Intel's device plugin does.
type SGXOptions struct {
	Enclave, Provision, EPC      string
	EnclaveLimit, ProvisionLimit int // how many containers may open the device at a time
}

// sgx offers opens of the two SGX devices, and tells the bytes of enclave page
// cache. The bytes are for the scheduler: the kernel gives EPC to whoever opens
// the device.
type sgx struct {
	o SGXOptions
	m tee.Machine
}

const (
	sgxEnclave   = "/dev/sgx_enclave"
	sgxProvision = "/dev/sgx_provision"
)

func (s *sgx) Name() string { return "sgx" }

func (s *sgx) Scan(context.Context) ([]tee.Resource, error) {
	if !s.m.Exists(sgxEnclave) {
		return nil, nil
	}
	found := []tee.Resource{{Name: s.o.Enclave, Model: tee.Count, Parts: []tee.Part{{
		Units: s.o.EnclaveLimit, Grant: tee.Grant{Devices: devices(s.m, sgxEnclave)},
	}}}}
	if s.m.Exists(sgxProvision) {
		found = append(found, tee.Resource{Name: s.o.Provision, Model: tee.Count, Parts: []tee.Part{{
			Units: s.o.ProvisionLimit, Grant: tee.Grant{Devices: devices(s.m, sgxProvision)},
		}}})
	}
	epc := s.m.EPC()
	if len(epc) > 0 {
		r := tee.Resource{Name: s.o.EPC, Model: tee.Bytes}
		for _, node := range slices.Sorted(maps.Keys(epc)) {
			r.Parts = append(r.Parts, tee.Part{Key: fmt.Sprintf("node%d", node), Bytes: epc[node], NUMA: []int64{node}})
		}
		found = append(found, r)
	}
	return found, nil
}

func (s *sgx) Health(_ context.Context, found []tee.Resource) []tee.Ailment {
	return deviceHealth(s.m, found)
}

func (s *sgx) WatchPaths() []string { return []string{s.m.Path(sgxEnclave), s.m.Path(sgxProvision)} }

// deviceHealth looks at the device nodes that every part grants.
func deviceHealth(m tee.Machine, found []tee.Resource) []tee.Ailment {
	var all []tee.Ailment
	for _, r := range found {
		for _, p := range r.Parts {
			for _, d := range p.Grant.Devices {
				if err := m.CharDevice(d.Container); err != nil {
					all = append(all, tee.Ailment{Resource: r.Name, Part: p.Key, Reason: err.Error()})
				}
			}
		}
	}
	return all
}
