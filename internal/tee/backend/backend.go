// Package backend holds the technologies that the inventory knows: a backend a
// file. Each reads the machine and tells what it found; none of them knows of
// kubelet.
package backend

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee"
	"cloister.dev/internal/tee/teec"
)

// Options say how the backends work. The zero value is not useful: see Defaults.
type Options struct {
	Machine   tee.Machine
	TrustZone TrustZoneOptions
	SGX       SGXOptions
	SEV       MiscOptions
	TDX       MiscOptions
	TPM       TPMOptions
	Sim       SimOptions
	// Teec reaches the trusted application; TrustZone needs it.
	Teec teec.Options
}

// Defaults are the names and figures that pods of the original plugins expect.
func Defaults() Options {
	return Options{
		TrustZone: TrustZoneOptions{
			Resource: "huawei.com/tee-ram", PrecisionKiB: MinPrecisionKiB, ReserveKiB: 600 << 10,
			Devices: []string{"/dev/tc_ns_cvm", "/dev/teelog"}, Folders: []string{"/var/itrustee/teecd"},
		},
		SGX: SGXOptions{Enclave: "sgx.intel.com/enclave", Provision: "sgx.intel.com/provision", EPC: "sgx.intel.com/epc", EnclaveLimit: 110, ProvisionLimit: 110},
		SEV: MiscOptions{Resources: map[string]string{"sev": "sev.amd.com/asids", "sev_es": "sev-snp.amd.com/esids"}},
		TDX: MiscOptions{Resources: map[string]string{"tdx": "tdx.intel.com/keys"}},
		TPM: TPMOptions{Resource: "cloister.dev/tpm", Limit: 16},
		Sim: SimOptions{Resource: "cloister.sim/tee-ram", PrecisionKiB: MinPrecisionKiB, MemoryKiB: 64 << 10, Nodes: 1},
		Teec: teec.Options{
			Library: "libteec.so", UUID: "e3d37f4a-f24c-48d0-8884-3bdd6c44e988", Login: teec.LoginIdentify,
			TAPath: "/data/e3d37f4a-f24c-48d0-8884-3bdd6c44e988.sec",
		},
	}
}

// Names are all backends. "sim" is taken only when it is named.
func Names() []string { return []string{"trustzone", "sgx", "sev", "tdx", "tpm", "sim"} }

// Auto names the backends whose technology the machine has.
func Auto(m tee.Machine) []string {
	var names []string
	for _, f := range m.Probe() {
		for _, n := range Names() {
			if f.Technology == n && f.Present {
				names = append(names, n)
			}
		}
	}
	return names
}

// Open makes backends by name.
func Open(names []string, o Options) ([]tee.Backend, error) {
	var all []tee.Backend
	have := map[string]bool{}
	for _, n := range names {
		if have[n] {
			return nil, fmt.Errorf("backend %q is named twice: %w", n, errdefs.ErrInvalidArgument)
		}
		have[n] = true
		b, err := open(n, o)
		if err != nil {
			return nil, fmt.Errorf("backend %s: %w", n, err)
		}
		all = append(all, b)
	}
	return all, nil
}

func open(name string, o Options) (tee.Backend, error) {
	switch name {
	case "trustzone":
		if err := checkPrecision(o.TrustZone.PrecisionKiB); err != nil {
			return nil, err
		}
		c, err := teec.New(o.Teec)
		if err != nil {
			return nil, err
		}
		return &trustZone{o: o.TrustZone, m: o.Machine, mem: c, settings: fmt.Sprintf("%s, ta_uuid %s", o.Teec.Library, o.Teec.UUID)}, nil
	case "sgx":
		return &sgx{o: o.SGX, m: o.Machine}, nil
	case "sev":
		return &misc{name: "sev", o: o.SEV, m: o.Machine, device: "/dev/sev"}, nil
	case "tdx":
		return &misc{name: "tdx", o: o.TDX, m: o.Machine}, nil
	case "tpm":
		return &tpm{o: o.TPM, m: o.Machine}, nil
	case "sim":
		if err := checkPrecision(o.Sim.PrecisionKiB); err != nil {
			return nil, err
		}
		return &sim{o: o.Sim}, nil
	}
	return nil, fmt.Errorf("there is no such backend; there are %s: %w", strings.Join(Names(), ", "), errdefs.ErrInvalidArgument)
}

// MinPrecisionKiB is the smallest unit of a memory, and the default.
const MinPrecisionKiB = 512

func checkPrecision(kib int64) error {
	if kib < MinPrecisionKiB {
		return fmt.Errorf("precision is %d KiB; it has to be %d or more: %w", kib, MinPrecisionKiB, errdefs.ErrInvalidArgument)
	}
	return nil
}

// devices grants device nodes under their own names.
func devices(m tee.Machine, paths ...string) []tee.Device {
	all := make([]tee.Device, 0, len(paths))
	for _, p := range paths {
		all = append(all, tee.Device{Host: m.Path(p), Container: p, Access: "rw"})
	}
	return all
}
