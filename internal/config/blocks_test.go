package config

import (
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// Blocks of configuration as administrators have them, each accepted as it
// stands and meaning what it means to containerd.
func TestBlocks(t *testing.T) {
	tests := map[string]func(*testing.T, Config){
		"rune-v1": func(t *testing.T, c Config) {
			same(t, "sandbox image", c.Images.PinnedImages["sandbox"], "registry.cn-hangzhou.aliyuncs.com/acs/pause-amd64:3.1")
			same(t, "snapshotter", c.Images.Snapshotter, "overlayfs")
			same(t, "default", c.Runtime.Containerd.DefaultRuntimeName, "default")
			sameHandler(t, c, "default", RuncType, RuncOptions{BinaryName: "/usr/bin/runc"})
			same(t, "rune", c.Runtime.Containerd.Runtimes["rune"].RuntimeType, "io.containerd.rune.v2")
			warned(t, c, "default_runtime is deprecated", "runtimes and name it in default_runtime_name")
			warned(t, c, "runtime_type is io.containerd.runtime.v1.linux, which is gone", RuncType)
			warned(t, c, "runtime_engine is deprecated", "BinaryName")
		},
		"kata-handlers-v1": func(t *testing.T, c Config) {
			sameHandler(t, c, "runc", RuncType, RuncOptions{BinaryName: "runc"})
			sameHandler(t, c, "katacli", RuncType, RuncOptions{BinaryName: "/usr/bin/kata-runtime"})
			same(t, "kata", c.Runtime.Containerd.Runtimes["kata"].RuntimeType, "io.containerd.kata.v2")
			warned(t, c, "runtime_type is io.containerd.runc.v1, which is gone", RuncType)
		},
		"kata-untrusted-v1": func(t *testing.T, c Config) {
			sameHandler(t, c, "untrusted", RuncType, RuncOptions{BinaryName: "/usr/bin/kata-runtime"})
			warned(t, c, "untrusted_workload_runtime is deprecated", `handler "untrusted"`)
		},
		"kata-v2": func(t *testing.T, c Config) {
			same(t, "kata", c.Runtime.Containerd.Runtimes["kata"], Handler{RuntimeType: "io.containerd.kata.v2",
				PodAnnotations: []string{"io.katacontainers.*"}, PrivilegedWithoutHostDevices: true})
			quiet(t, c)
		},
		"systemd-cgroup": func(t *testing.T, c Config) {
			sameHandler(t, c, "runc", RuncType, RuncOptions{SystemdCgroup: true})
			quiet(t, c)
		},
		"snapshotter": func(t *testing.T, c Config) {
			same(t, "snapshotter", c.Images.Snapshotter, "overlayfs")
			quiet(t, c)
		},
		"handlers": func(t *testing.T, c Config) {
			same(t, "default", c.Runtime.Containerd.DefaultRuntimeName, "crun")
			sameHandler(t, c, "crun", RuncType, RuncOptions{BinaryName: "/usr/local/bin/crun"})
			same(t, "gvisor", c.Runtime.Containerd.Runtimes["gvisor"].RuntimeType, "io.containerd.runsc.v1")
			same(t, "kata", c.Runtime.Containerd.Runtimes["kata"].RuntimeType, "io.containerd.kata.v2")
			quiet(t, c)
		},
		"reference": reference,
		"decryption": func(t *testing.T, c Config) {
			same(t, "key model", c.Images.ImageDecryption.KeyModel, "node")
			for name, mediaType := range map[string]string{"tar.gzip": "tar+gzip", "tar": "tar"} {
				const layer = "application/vnd.oci.image.layer.v1."
				same(t, name, c.StreamProcessors["io.containerd.ocicrypt.decoder.v1."+name], StreamProcessor{
					Accepts: []string{layer + mediaType + "+encrypted"}, Returns: layer + mediaType, Path: "ctd-decoder",
					Args: []string{"--decryption-keys-path", "/etc/containerd/ocicrypt/keys"},
					Env:  []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/containerd/ocicrypt/ocicrypt_keyprovider.conf"},
				})
			}
			quiet(t, c)
		},
		"registry-path": func(t *testing.T, c Config) {
			same(t, "config_path", c.Images.Registry.ConfigPath, "/etc/containerd/certs.d")
			quiet(t, c)
		},
		"registry-auth": func(t *testing.T, c Config) {
			same(t, "auth", c.Images.Registry.Configs["gcr.io"].Auth, RegistryAuth{})
		},
		"registry-mirrors": func(t *testing.T, c Config) {
			r := c.Images.Registry
			same(t, "docker.io", r.Mirrors["docker.io"].Endpoints, []string{"https://registry-1.docker.io"})
			same(t, "gcr.io", r.Mirrors["gcr.io"].Endpoints, []string{"https://gcr.io"})
			same(t, "user", r.Configs["gcr.io"].Auth.Username, "_json_key")
			same(t, "password", r.Configs["gcr.io"].Auth.Password.Reveal(), "paste output from jq")
			same(t, "config_path", r.ConfigPath, "")
			warned(t, c, "mirrors is deprecated", "hosts.toml")
			warned(t, c, "configs is deprecated", "kubelet")
		},
	}
	files, err := filepath.Glob("testdata/blocks/*.toml")
	if err != nil || len(files) != len(tests) {
		t.Fatalf("%d blocks, %d tests: %v", len(files), len(tests), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".toml")
		t.Run(name, func(t *testing.T) {
			c, err := Load(file)
			if err != nil {
				t.Fatal(err)
			}
			tests[name](t, c)
		})
	}
}

// reference is the file that names every key of version 2.
func reference(t *testing.T, c Config) {
	want := Default()
	want.Images.PinnedImages["sandbox"] = "registry.k8s.io/pause:3.9"
	want.Runtime.EnableUnprivilegedPorts = false
	want.Runtime.EnableUnprivilegedICMP = false
	want.Runtime.NetNSMountsUnderStateDir = false
	want.Runtime.DrainExecSyncIOTimeout = Duration{}
	want.Runtime.CNI.IPPref = "ipv4"
	want.Runtime.Containerd.DefaultRuntimeName = "runc"
	got := c.Runtime.Containerd.Runtimes
	c.Runtime.Containerd.Runtimes = nil
	strays := 0
	for _, w := range c.Warnings {
		if !strings.Contains(w.Message, "before the header of x509_key_pair_streaming") {
			t.Errorf("warning %v", w)
		}
		strays++
	}
	if strays != 12 {
		t.Errorf("%d keys are told to stand in a wrong table, want 12", strays)
	}
	c = valuesOnly(c)
	for i := range reflect.TypeFor[Config]().NumField() {
		same(t, reflect.TypeFor[Config]().Field(i).Name, reflect.ValueOf(c).Field(i).Interface(), reflect.ValueOf(want).Field(i).Interface())
	}
	if len(got) != 1 {
		t.Errorf("handlers %v, want runc alone", got)
	}
	same(t, "cni_conf_dir", got["runc"].CNIConfDir, "/etc/cni/net.d")
	same(t, "cni_max_conf_num", got["runc"].CNIMaxConfNum, 1)
	sameHandler(t, Config{Runtime: Runtime{Containerd: Containerd{Runtimes: got}}}, "runc", RuncType, RuncOptions{})
	same(t, "idle timeout", c.Streaming.IdleTimeout.Duration, 4*time.Hour)
}

// Keys of the table that the reference file has under the wrong header act.
func TestStrayedKeysAct(t *testing.T) {
	c := load(t, `version = 2
[plugins."io.containerd.grpc.v1.cri".x509_key_pair_streaming]
tls_cert_file = ""
max_concurrent_downloads = 7
disable_cgroup = true
drain_exec_sync_io_timeout = "5s"
`)
	same(t, "downloads", c.Images.MaxConcurrentDownloads, 7)
	same(t, "cgroup", c.Cloister.DisableCgroup, true)
	same(t, "drain", c.Runtime.DrainExecSyncIOTimeout.Duration, 5*time.Second)
	warned(t, c, "disable_cgroup is deprecated", "[cloister]")
}

// valuesOnly leaves out where a configuration comes from.
func valuesOnly(c Config) Config {
	c.Files, c.Folders, c.Warnings = nil, nil, nil
	return c
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if reflect.DeepEqual(got, want) {
		return
	}
	if a, ok := got.(Config); ok { // tell where
		for i := range reflect.TypeFor[Config]().NumField() {
			same(t, what+" "+reflect.TypeFor[Config]().Field(i).Name, reflect.ValueOf(a).Field(i).Interface(), reflect.ValueOf(want).Field(i).Interface())
		}
		return
	}
	t.Errorf("%s: got %+v, want %+v", what, got, want)
}

func sameHandler(t *testing.T, c Config, name, kind string, want RuncOptions) {
	t.Helper()
	h, ok := c.Runtime.Containerd.Runtimes[name]
	o, err := h.RuncOptions()
	if !ok || h.RuntimeType != kind || o != want || err != nil {
		t.Errorf("handler %s: got %+v with %+v (%v), want %+v", name, h, o, err, want)
	}
}

func warned(t *testing.T, c Config, parts ...string) {
	t.Helper()
	if !slices.ContainsFunc(c.Warnings, func(w Warning) bool {
		return !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(w.String(), p) })
	}) {
		t.Errorf("no warning has %q: %v", parts, c.Warnings)
	}
}

func quiet(t *testing.T, c Config) {
	t.Helper()
	if len(c.Warnings) > 0 {
		t.Errorf("warnings %v", c.Warnings)
	}
}

// What containerd writes as its defaults is taken without a word, and means
// the same socket and folders.
func TestDefaultFilesOfContainerd(t *testing.T) {
	for _, file := range []string{"1.5", "2.4"} {
		c, err := Load("testdata/defaults/" + file + ".toml")
		if err != nil {
			t.Fatal(err)
		}
		quiet(t, c)
		same(t, file, []string{c.Root, c.State, c.Address},
			[]string{"/var/lib/containerd", "/run/containerd", "/run/containerd/containerd.sock"})
		sameHandler(t, c, "runc", RuncType, RuncOptions{})
		same(t, "handlers of "+file, len(c.Runtime.Containerd.Runtimes), 1)
		same(t, "config_path of "+file, c.Images.Registry.ConfigPath, Default().Images.Registry.ConfigPath)
		same(t, "decoders of "+file, len(c.StreamProcessors), 2)
	}
}
