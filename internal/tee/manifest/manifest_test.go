package manifest

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func options(backend, resource string) Options {
	return Options{Backend: backend, Image: "registry.example/cloister:1", TestImage: "docker.io/library/busybox", Resource: resource, Precision: 512, Health: "1m0s", Test: true}
}

// object is what the tests look at.
type object struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Spec     struct {
		Template struct {
			Spec struct {
				NodeSelector                 map[string]string
				AutomountServiceAccountToken *bool
				Containers                   []struct {
					Command         []string
					SecurityContext struct {
						Privileged, ReadOnlyRootFilesystem bool
						Capabilities                       struct{ Drop []string }
					}
					VolumeMounts []struct{ Name, MountPath string }
				}
				Volumes []struct {
					Name     string
					HostPath struct{ Path, Type string }
				}
			}
		}
		Containers []struct {
			Resources struct{ Limits map[string]string }
		}
	}
}

func TestWrite(t *testing.T) {
	tests := []struct {
		backend, resource, selector string
		privileged                  bool
		hostPaths                   []string
		kinds                       string
	}{
		{"trustzone", "huawei.com/tee-ram", "teetype=trustzone", true, []string{"/var/itrustee/teecd", "/data"}, "DaemonSet Pod"},
		{"sgx", "sgx.intel.com/enclave", "sgx.intel.com/capable=true", false, []string{"/dev/sgx_enclave", "/dev/sgx_provision"}, "ServiceAccount ClusterRole ClusterRoleBinding DaemonSet Pod"},
		{"sev", "sev-snp.amd.com/esids", "tee.cloister.dev/sev=true", false, []string{"/dev/sev", "/sys/fs/cgroup"}, "DaemonSet Pod"},
		{"tdx", "tdx.intel.com/keys", "tee.cloister.dev/tdx=true", false, []string{"/sys/fs/cgroup"}, "DaemonSet Pod"},
		{"tpm", "cloister.dev/tpm", "tee.cloister.dev/tpm=true", false, []string{"/dev/tpmrm0"}, "DaemonSet Pod"},
		{"sim", "cloister.sim/tee-ram", "tee.cloister.dev/sim=true", false, nil, "DaemonSet Pod"},
	}
	for _, tt := range tests {
		t.Run(tt.backend, func(t *testing.T) {
			b, err := Write(options(tt.backend, tt.resource))
			if err != nil {
				t.Fatal(err)
			}
			var kinds []string
			for _, doc := range strings.Split(string(b), "\n---\n") {
				var o object
				if err := yaml.UnmarshalStrict([]byte(doc), &map[string]any{}); err != nil {
					t.Fatalf("%v in\n%s", err, doc)
				}
				if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
					t.Fatal(err)
				}
				kinds = append(kinds, o.Kind)
				switch o.Kind {
				case "DaemonSet":
					checkDaemonSet(t, o, tt.selector, tt.privileged, tt.hostPaths)
				case "Pod":
					if o.Spec.Containers[0].Resources.Limits[tt.resource] == "" {
						t.Errorf("the test pod asks for %v", o.Spec.Containers[0].Resources.Limits)
					}
				}
			}
			if got := strings.Join(kinds, " "); got != tt.kinds {
				t.Errorf("objects: %s", got)
			}
		})
	}
}

func checkDaemonSet(t *testing.T, o object, selector string, privileged bool, hostPaths []string) {
	t.Helper()
	s := o.Spec.Template.Spec
	c := s.Containers[0]
	name, value, _ := strings.Cut(selector, "=")
	if s.NodeSelector[name] != value || len(s.NodeSelector) != 1 {
		t.Errorf("node selector: %v", s.NodeSelector)
	}
	if o.Metadata.Namespace != "kube-system" || !c.SecurityContext.ReadOnlyRootFilesystem || c.SecurityContext.Privileged != privileged {
		t.Errorf("security: %+v in %s", c.SecurityContext, o.Metadata.Namespace)
	}
	if !privileged && strings.Join(c.SecurityContext.Capabilities.Drop, "") != "ALL" {
		t.Errorf("capabilities: %v", c.SecurityContext.Capabilities)
	}
	var paths []string
	for _, v := range s.Volumes {
		if v.HostPath.Path != "" {
			paths = append(paths, v.HostPath.Path)
		}
	}
	if got, want := strings.Join(paths, " "), strings.Join(append([]string{"/var/lib/kubelet/device-plugins"}, hostPaths...), " "); got != want {
		t.Errorf("paths of the host: %s, want %s", got, want)
	}
	if len(c.VolumeMounts) != len(s.Volumes) {
		t.Errorf("%d mounts of %d volumes", len(c.VolumeMounts), len(s.Volumes))
	}
}

func TestBad(t *testing.T) {
	for _, o := range []Options{options("", "a/b"), options("unobtainium", "a/b"), {Backend: "sim"}, {Backend: "sim", Image: "x\"\n- evil"}} {
		if b, err := Write(o); err == nil {
			t.Errorf("%+v gave\n%s", o, b)
		}
	}
}

// The files in deploy are what the command prints.
func TestDeployIsCurrent(t *testing.T) {
	for backend, resource := range map[string]string{"trustzone": "huawei.com/tee-ram", "sgx": "sgx.intel.com/enclave"} {
		want, err := Write(options(backend, resource))
		if err != nil {
			t.Fatal(err)
		}
		path := "../../../deploy/device-plugin-" + backend + ".yaml"
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the program writes (%v); run make generate", path, err)
		}
	}
}
