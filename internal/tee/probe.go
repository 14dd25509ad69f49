package tee

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Finding is what a probe tells of one technology.
type Finding struct {
	// Technology is a name such as "sgx"; that of the backend which serves it.
	Technology string `json:"technology"`
	// Present means that the machine has it, Usable that it can be used now.
	Present bool `json:"present"`
	Usable  bool `json:"usable"`
	// Evidence is what was seen, one fact a line.
	Evidence []string `json:"evidence,omitempty"`
	// Remedy says what is missing, when something is there and cannot be used.
	Remedy string `json:"remedy,omitempty"`
}

func (f *Finding) saw(format string, args ...any) {
	f.Present = true
	f.Evidence = append(f.Evidence, fmt.Sprintf(format, args...))
}

// Probe looks for every technology that the package knows. It reads only.
func (m Machine) Probe() []Finding {
	return []Finding{m.probeSGX(), m.probeTDX(), m.probeSEV(), m.probeTrustZone(), m.probeOPTEE(), m.probeTPM(), m.probeGuest()}
}

func (m Machine) probeSGX() Finding {
	f := Finding{Technology: "sgx"}
	flags := m.CPUFlags()
	for _, flag := range []string{"sgx", "sgx_lc"} {
		for _, have := range flags {
			if have == flag {
				f.saw("processor flag %s", flag)
			}
		}
	}
	var total int64
	for node, n := range m.EPC() {
		f.saw("%d bytes of EPC on NUMA node %d", n, node)
		total += n
	}
	enclave := m.CharDevice("/dev/sgx_enclave")
	if enclave == nil {
		f.saw("/dev/sgx_enclave")
	}
	f.Usable = enclave == nil && total > 0
	switch {
	case f.Usable || !f.Present:
	case enclave != nil:
		f.Remedy = enclave.Error() + "; enable SGX with launch control in the firmware, and CONFIG_X86_SGX"
	default:
		f.Remedy = "the kernel tells no EPC; it has to be 5.18 or newer"
	}
	return f
}

func (m Machine) probeTDX() Finding {
	f := Finding{Technology: "tdx"}
	if strings.HasPrefix(m.Read("/sys/module/kvm_intel/parameters/tdx"), "Y") {
		f.saw("kvm_intel has tdx=Y")
	}
	n, ok := m.MiscCapacity("tdx")
	if ok {
		f.saw("%d TDX key ids", n)
	}
	if f.Present && !ok {
		f.Remedy = "the misc cgroup controller counts no key ids; mount it, or enable CONFIG_CGROUP_MISC"
	}
	f.Usable = ok
	return f
}

func (m Machine) probeSEV() Finding {
	f := Finding{Technology: "sev"}
	for _, p := range []string{"sev", "sev_es", "sev_snp"} {
		if v := m.Read("/sys/module/kvm_amd/parameters/" + p); v == "Y" || v == "1" {
			f.saw("kvm_amd has %s=%s", p, v)
		}
	}
	any := false
	for _, key := range []string{"sev", "sev_es"} {
		if n, ok := m.MiscCapacity(key); ok {
			f.saw("%d address space ids of %s", n, key)
			any = true
		}
	}
	dev := m.CharDevice("/dev/sev")
	if dev == nil {
		f.saw("/dev/sev")
	}
	f.Usable = any && dev == nil
	if f.Present && !f.Usable {
		f.Remedy = "it takes /dev/sev (module ccp) and the misc cgroup controller; enable SEV in the firmware"
	}
	return f
}

func (m Machine) probeTrustZone() Finding {
	f := Finding{Technology: "trustzone"}
	var missing []string
	for _, dev := range []string{"/dev/tc_ns_client", "/dev/tc_private", "/dev/tc_ns_cvm", "/dev/teelog"} {
		if err := m.CharDevice(dev); err != nil {
			missing = append(missing, dev)
			continue
		}
		f.saw("%s", dev)
	}
	f.Usable = f.Present && m.CharDevice("/dev/tc_ns_cvm") == nil
	if f.Present && len(missing) > 0 {
		f.Remedy = "missing: " + strings.Join(missing, ", ") + "; pods need the confidential TEE OS with /dev/tc_ns_cvm, and teecd"
	}
	return f
}

// Of <linux/tee.h>.
const (
	teeIOCVersion = 0x800ca400 // _IOR(0xa4, 0, struct tee_ioctl_version_data)
	teeImplOPTEE  = 1
)

type teeVersion struct{ impl, implCaps, genCaps uint32 }

// probeOPTEE recognises OP-TEE, which needs no device plugin backend: its
// client interface tells no figure of memory.
func (m Machine) probeOPTEE() Finding {
	f := Finding{Technology: "optee"}
	if m.Exists("/proc/device-tree/firmware/optee") {
		f.saw("device tree node firmware/optee")
	}
	if err := m.CharDevice("/dev/tee0"); err != nil {
		if f.Present {
			f.Remedy = err.Error() + "; load the module optee"
		}
		return f
	}
	f.saw("/dev/tee0")
	v, err := readTEEVersion(m.Path("/dev/tee0"))
	switch {
	case err != nil:
		f.Remedy = fmt.Sprintf("/dev/tee0 does not answer as a TEE: %v", err)
	case v.impl == teeImplOPTEE:
		f.saw("implementation is OP-TEE, capabilities %#x", v.implCaps)
		f.Usable = true
	default:
		f.saw("implementation %d", v.impl)
		f.Usable = true
	}
	return f
}

func (m Machine) probeTPM() Finding {
	f := Finding{Technology: "tpm"}
	if v := m.Read("/sys/class/tpm/tpm0/tpm_version_major"); v != "" {
		f.saw("TPM %s", v)
	}
	err := m.CharDevice("/dev/tpmrm0")
	if err == nil {
		f.saw("/dev/tpmrm0")
	} else if f.Present {
		f.Remedy = err.Error() + "; TPM 2.0 and CONFIG_TCG_TPM make it"
	}
	f.Usable = err == nil
	return f
}

// probeGuest tells whether the machine is itself a confidential guest.
func (m Machine) probeGuest() Finding {
	f := Finding{Technology: "confidential-guest"}
	for _, dev := range []string{"/dev/tdx_guest", "/dev/sev-guest"} {
		if m.CharDevice(dev) == nil {
			f.saw("%s", dev)
		}
	}
	if m.Exists("/sys/kernel/config/tsm/report") {
		f.saw("configfs tsm/report")
	}
	f.Usable = f.Present
	return f
}

var errShortIoctl = errors.New("no version")

func readTEEVersion(path string) (teeVersion, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return teeVersion{}, err
	}
	defer unix.Close(fd)
	v, err := teeIoctl(fd)
	if err == nil && v == (teeVersion{}) {
		err = errShortIoctl
	}
	return v, err
}
