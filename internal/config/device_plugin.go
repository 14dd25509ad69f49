package config

import (
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// DevicePlugin is [device_plugin]: what trusted execution technology of the
// machine kubelet is offered.
type DevicePlugin struct {
	// Enabled lets the daemon offer it. "cloister device-plugin" does so by itself.
	Enabled bool `toml:"enabled"`
	// Backends are the technologies: "trustzone", "sgx", "sev", "tdx", "tpm" and
	// "sim". Empty takes those that the machine has, which "sim" never is.
	Backends []string `toml:"backends"`
	// KubeletDir holds the folder device-plugins with kubelet's socket.
	KubeletDir string `toml:"kubelet_dir"`
	// CDIDir is where CDI specifications are written; "" writes none.
	CDIDir string `toml:"cdi_dir"`
	// Precision is the size of a unit of TEE memory in KiB, 512 or more.
	Precision int `toml:"precision"`
	// HealthInterval is the time between two checks; "0s" checks only when a
	// device node comes or goes.
	HealthInterval Duration `toml:"health_interval"`
	// MaxDevices is the most units of one resource. kubelet takes lists up to 4 MiB.
	MaxDevices int `toml:"max_devices"`
	// MetricsAddress serves Prometheus metrics on TCP, as HOST:PORT; "" serves
	// them on the status socket alone.
	MetricsAddress string `toml:"metrics_address"`
	// Kubeconfig are credentials to label the Node, to tell its EPC and events;
	// "" does none of it, "in-cluster" takes those of the pod.
	Kubeconfig string `toml:"kubeconfig"`
	// NodeName is the Node's name; "" is the host's.
	NodeName string `toml:"node_name"`
	// Needs names for runtime handlers the backend that they cannot do without:
	// a handler is as ready as its backend.
	Needs     map[string]string `toml:"needs"`
	TrustZone TrustZone         `toml:"trustzone"`
	SGX       SGX               `toml:"sgx"`
	SEV       SEV               `toml:"sev"`
	TDX       TDX               `toml:"tdx"`
	TPM       TPM               `toml:"tpm"`
	Sim       Sim               `toml:"sim"`
}

// TrustZone is the table trustzone of DevicePlugin: iTrustee's memory.
type TrustZone struct {
	// Resource is the name that pods ask for.
	Resource string `toml:"resource"`
	// Library is the TEE client library, a path or a name for the dynamic linker.
	Library string `toml:"library"`
	// TAUUID is that of the trusted application that tells the memory.
	TAUUID string `toml:"ta_uuid"`
	// TAPath is that application's file; "" lets the TEE find it.
	TAPath string `toml:"ta_path"`
	// Login is "identify", iTrustee's, or "public".
	Login string `toml:"login"`
	// Helper is the program that loads Library; "" finds cloister-teec. A trusted
	// application that knows its callers by their path sees this one.
	Helper string `toml:"helper"`
	// Reserve is how much of the memory the TEE keeps for itself, in KiB.
	Reserve int `toml:"reserve"`
	// Devices are given to containers.
	Devices []string `toml:"devices"`
	// Folders are mounted into containers, read-only.
	Folders []string `toml:"folders"`
}

// SGX is the table sgx of DevicePlugin.
type SGX struct {
	// EnclaveLimit is how many containers may hold sgx.intel.com/enclave.
	EnclaveLimit int `toml:"enclave_limit"`
	// ProvisionLimit is how many containers may hold sgx.intel.com/provision.
	ProvisionLimit int `toml:"provision_limit"`
}

// SEV is the table sev of DevicePlugin.
type SEV struct {
	// ASIDs is the resource for address space ids of SEV guests; "" offers none.
	ASIDs string `toml:"asids"`
	// ESIDs is the resource for those of SEV-ES and SEV-SNP guests; "" offers none.
	ESIDs string `toml:"esids"`
}

// TDX is the table tdx of DevicePlugin.
type TDX struct {
	// Keys is the resource for key ids of trust domains.
	Keys string `toml:"keys"`
}

// TPM is the table tpm of DevicePlugin.
type TPM struct {
	// Resource is the name that pods ask for.
	Resource string `toml:"resource"`
	// Limit is how many containers may hold one TPM.
	Limit int `toml:"limit"`
}

// Sim is the table sim of DevicePlugin: memory of a TEE that does not exist.
type Sim struct {
	// Resource is the name that pods ask for; it begins with "cloister.sim/".
	Resource string `toml:"resource"`
	// Memory is how much there is, in KiB.
	Memory int `toml:"memory"`
	// NUMANodes is how many nodes it is spread over.
	NUMANodes int `toml:"numa_nodes"`
	// FaultFile makes it unhealthy while the file is there; its text is the reason.
	FaultFile string `toml:"fault_file"`
	// Devices are given to containers.
	Devices []string `toml:"devices"`
	// Folders are mounted into containers, read-only.
	Folders []string `toml:"folders"`
}

func defaultDevicePlugin() DevicePlugin {
	const uuid = "e3d37f4a-f24c-48d0-8884-3bdd6c44e988"
	return DevicePlugin{
		KubeletDir: "/var/lib/kubelet", CDIDir: "/var/run/cdi", Precision: 512, HealthInterval: Duration{time.Minute}, MaxDevices: 220_000,
		TrustZone: TrustZone{Resource: "huawei.com/tee-ram", Library: "libteec.so", TAUUID: uuid, TAPath: "/data/" + uuid + ".sec",
			Login: "identify", Reserve: 600 << 10, Devices: []string{"/dev/tc_ns_cvm", "/dev/teelog"}, Folders: []string{"/var/itrustee/teecd"}},
		SGX: SGX{EnclaveLimit: 110, ProvisionLimit: 110},
		SEV: SEV{ASIDs: "sev.amd.com/asids", ESIDs: "sev-snp.amd.com/esids"},
		TDX: TDX{Keys: "tdx.intel.com/keys"},
		TPM: TPM{Resource: "cloister.dev/tpm", Limit: 16},
		Sim: Sim{Resource: "cloister.sim/tee-ram", Memory: 64 << 10, NUMANodes: 1},
	}
}

var (
	uuidForm     = form(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	resourceForm = form(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
)

func (j *judge) devicePlugin(c *DevicePlugin) {
	at := keyPath{"device_plugin"}
	known := []string{"trustzone", "sgx", "sev", "tdx", "tpm", "sim"}
	for _, b := range c.Backends {
		j.oneOf(at.and("backends"), b, known...)
	}
	for handler, b := range c.Needs {
		j.oneOf(at.and("needs", handler), b, known...)
	}
	j.require(len(c.Needs) == 0 || c.Enabled, at.and("needs"), "is set, but the daemon checks nothing; set enabled = true")
	j.absolute(at.and("kubelet_dir"), c.KubeletDir)
	j.require(c.CDIDir == "" || filepath.IsAbs(c.CDIDir), at.and("cdi_dir"), "is %q; it has to be an absolute path, or empty", c.CDIDir)
	j.require(c.Precision >= 512 && c.Precision <= 1<<30, at.and("precision"), "is %d KiB; it has to be in 512…%d", c.Precision, 1<<30)
	j.require(c.HealthInterval.Duration >= 0, at.and("health_interval"), "may not be negative; 0s switches checks off")
	j.require(c.MaxDevices > 0, at.and("max_devices"), "has to be above 0")
	j.require(c.Kubeconfig == "" || c.Kubeconfig == "in-cluster" || filepath.IsAbs(c.Kubeconfig), at.and("kubeconfig"),
		`is %q; it has to be an absolute path, "in-cluster", or empty`, c.Kubeconfig)
	j.trustZone(&c.TrustZone)
	j.require(c.SGX.EnclaveLimit > 0 && c.SGX.EnclaveLimit <= 10_000, at.and("sgx", "enclave_limit"), "has to be in 1…10000")
	j.require(c.SGX.ProvisionLimit > 0 && c.SGX.ProvisionLimit <= 10_000, at.and("sgx", "provision_limit"), "has to be in 1…10000")
	j.require(c.TPM.Limit > 0 && c.TPM.Limit <= 10_000, at.and("tpm", "limit"), "has to be in 1…10000")
	j.resource(at.and("sev", "asids"), c.SEV.ASIDs, true)
	j.resource(at.and("sev", "esids"), c.SEV.ESIDs, true)
	j.resource(at.and("tdx", "keys"), c.TDX.Keys, false)
	j.resource(at.and("tpm", "resource"), c.TPM.Resource, false)
	j.resource(at.and("sim", "resource"), c.Sim.Resource, false)
	j.require(strings.HasPrefix(c.Sim.Resource, "cloister.sim/"), at.and("sim", "resource"),
		`is %q; a simulated resource begins with "cloister.sim/", so that nobody takes it for a real one`, c.Sim.Resource)
	j.require(c.Sim.Memory >= c.Precision && c.Sim.Memory <= 1<<40, at.and("sim", "memory"), "is %d KiB, less than one unit, or beyond reason", c.Sim.Memory)
	j.require(c.Sim.NUMANodes >= 1 && c.Sim.NUMANodes <= 64, at.and("sim", "numa_nodes"), "has to be in 1…64")
	j.require(c.Sim.FaultFile == "" || filepath.IsAbs(c.Sim.FaultFile), at.and("sim", "fault_file"), "has to be absolute")
	for _, p := range slices.Concat(c.Sim.Devices, c.Sim.Folders) {
		j.absolute(at.and("sim"), p)
	}
}

func (j *judge) trustZone(t *TrustZone) {
	at := keyPath{"device_plugin", "trustzone"}
	j.resource(at.and("resource"), t.Resource, false)
	j.require(t.Library != "", at.and("library"), "is empty; name the TEE client library, such as libteec.so")
	j.require(uuidForm().MatchString(t.TAUUID), at.and("ta_uuid"), "is %q; a UUID is written 8-4-4-4-12 hexadecimal digits", t.TAUUID)
	j.oneOf(at.and("login"), t.Login, "identify", "public")
	j.require(t.Reserve >= 0, at.and("reserve"), "may not be negative")
	for _, p := range slices.Concat(t.Devices, t.Folders) {
		j.absolute(at.and("devices"), p)
	}
	j.require(t.Helper == "" || filepath.IsAbs(t.Helper), at.and("helper"), "has to be absolute")
	j.require(t.TAPath == "" || filepath.IsAbs(t.TAPath), at.and("ta_path"), "has to be absolute")
}

// resource judges the name of an extended resource of Kubernetes.
func (j *judge) resource(at keyPath, name string, mayBeEmpty bool) {
	if name == "" && mayBeEmpty {
		return
	}
	domain, _, _ := strings.Cut(name, "/")
	ok := resourceForm().MatchString(name) && domain != "kubernetes.io" && !strings.HasSuffix(domain, ".kubernetes.io")
	j.require(ok, at, "is %q; an extended resource is written DOMAIN/NAME, in a domain that is not Kubernetes' own", name)
}
