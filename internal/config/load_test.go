package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// write puts a file in its place at once: whoever watches sees no half of it.
func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	fresh := path + ".fresh"
	if err := os.WriteFile(fresh, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(fresh, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, text string) Config {
	t.Helper()
	c, err := Load(write(t, t.TempDir(), "config.toml", text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNoFileMeansDefaults(t *testing.T) {
	l := newLoader()
	if err := l.loadDefault(filepath.Join(t.TempDir(), "config.toml")); err != nil {
		t.Fatal(err)
	}
	c, err := l.finish()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(valuesOnly(c), Default()) {
		t.Errorf("got %+v, want the defaults", c)
	}
}

func TestNamedFileHasToExist(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "absent.toml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want ErrNotExist", err)
	}
}

func TestEveryKeyIsHeard(t *testing.T) {
	c := load(t, everyKey)
	h := c.Runtime.Containerd.Runtimes["crun"]
	opts, err := h.RuncOptions()
	if err != nil {
		t.Fatal(err)
	}
	kata, err := c.Runtime.Containerd.Runtimes["kata"].ShimOptions()
	if err != nil {
		t.Fatal(err)
	}
	checks := []struct {
		name      string
		got, want any
	}{
		{"root", c.Root, "/r"},
		{"state", c.State, "/s"},
		{"address", c.Address, "/a.sock"},
		{"level", c.LogLevel, "debug"},
		{"format", c.LogFormat, "json"},
		{"snapshotter", c.Images.Snapshotter, "native"},
		{"sandbox", c.Images.PinnedImages["sandbox"], "x/pause:1"},
		{"headers", c.Images.Registry.Headers["X-A"], []string{"b"}},
		{"progress", c.Images.ImagePullProgressTimeout.Duration, 90 * time.Second},
		{"platform", c.Images.RuntimePlatforms["kata"].Platform, "linux/arm64"},
		{"bin_dirs", c.Runtime.CNI.BinDirs, []string{"/b1", "/b2"}},
		{"ip_pref", c.Runtime.CNI.IPPref, "ipv6"},
		{"default", c.Runtime.Containerd.DefaultRuntimeName, "crun"},
		{"annotations", h.PodAnnotations, []string{"a.*"}},
		{"options", opts, RuncOptions{BinaryName: "crun", Root: "/rr", SystemdCgroup: true, NoNewKeyring: true}},
		{"shim options", kata, ShimOptions{ConfigPath: "/etc/kata.toml"}},
		{"hugetlb", c.Runtime.DisableHugetlbController, false},
		{"cdi", c.Runtime.CDISpecDirs, []string{"/cdi"}},
		{"drain", c.Runtime.DrainExecSyncIOTimeout.Duration, 10 * time.Second},
		{"port", c.Streaming.Port, "10010"},
		{"cert", c.Streaming.KeyPair.CertFile, "/c"},
		{"network", c.Cloister.Network, "builtin"},
		{"subnets", c.Cloister.BuiltinNetwork.Subnets, []string{"10.1.0.0/16"}},
		{"driver", c.Cloister.CgroupDriver, "systemd"},
	}
	for _, k := range checks {
		if !reflect.DeepEqual(k.got, k.want) {
			t.Errorf("%s: got %v, want %v", k.name, k.got, k.want)
		}
	}
}

// everyKey sets what the defaults do not, and uses inline tables too.
const everyKey = `version = 3
root = "/r"
state = "/s"
[grpc]
address = "/a.sock"
[debug]
level = "trace"
format = "json"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "native"
pinned_images = { sandbox = "x/pause:1" }
image_pull_progress_timeout = "1m30s"
[plugins."io.containerd.cri.v1.images".registry.headers]
X-A = ["b"]
[plugins."io.containerd.cri.v1.images".runtime_platforms.kata]
platform = "linux/arm64"
[plugins."io.containerd.cri.v1.runtime"]
disable_hugetlb_controller = false
cdi_spec_dirs = ["/cdi"]
drain_exec_sync_io_timeout = "10s"
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/b1", "/b2"]
ip_pref = "ipv6"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "crun"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
pod_annotations = ["a.*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun.options]
BinaryName = "crun"
Root = "/rr"
SystemdCgroup = true
NoNewKeyring = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
options = { ConfigPath = "/etc/kata.toml" }
[plugins."io.containerd.grpc.v1.cri"]
stream_server_port = "10010"
enable_tls_streaming = true
x509_key_pair_streaming = { tls_cert_file = "/c", tls_key_file = "/k" }
[cloister]
network = "builtin"
cgroup_driver = "systemd"
[cloister.builtin_network]
subnets = ["10.1.0.0/16"]
`

func TestSocketFollowsState(t *testing.T) {
	c := load(t, "version = 3\nstate = \"/s\"\n")
	if c.Address != "/s/cloister.sock" {
		t.Errorf("after the file: %s", c.Address)
	}
	c.SetState("/t")
	if c.Address != "/t/cloister.sock" || c.State != "/t" {
		t.Errorf("after SetState: %s in %s", c.Address, c.State)
	}
	c = load(t, "version = 3\nstate = \"/s\"\n[grpc]\naddress = \"/a.sock\"\n")
	if c.SetState("/t"); c.Address != "/a.sock" {
		t.Errorf("a named socket moved to %s", c.Address)
	}
}

func TestCgroupDriverReachesHandlers(t *testing.T) {
	const runtimes = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.%s]\nruntime_type = %q\n[cloister]\ncgroup_driver = \"systemd\"\n"
	c := load(t, fmt.Sprintf(runtimes, "crun", "io.containerd.runc.v2"))
	if o, err := c.Runtime.Containerd.Runtimes["crun"].RuncOptions(); err != nil || !o.SystemdCgroup {
		t.Errorf("got %+v, %v", o, err)
	}
	c = load(t, fmt.Sprintf(runtimes, "kata", "io.containerd.kata.v2"))
	if o := c.Runtime.Containerd.Runtimes["kata"].Options; o != nil {
		t.Errorf("another shim got options %v", o)
	}
}

func TestLaterFilesWin(t *testing.T) {
	dir := t.TempDir()
	main := write(t, dir, "config.toml", `version = 3
root = "/main"
state = "/main-state"
imports = ["conf.d/*.toml"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
options = { BinaryName = "runc", SystemdCgroup = true }
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/one", "/two"]
`)
	write(t, dir, "conf.d/10.toml", "root = \"/ten\"\n[plugins.\"io.containerd.cri.v1.runtime\".cni]\nbin_dirs = [\"/three\"]\n")
	write(t, dir, "conf.d/20.toml", `version = 3
root = "/twenty"
imports = ["../config.toml"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "/opt/runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
`)
	c, err := Load(main)
	if err != nil {
		t.Fatal(err)
	}
	runtimes := c.Runtime.Containerd.Runtimes
	if c.Root != "/twenty" || c.State != "/main-state" {
		t.Errorf("root %s, state %s", c.Root, c.State)
	}
	if want := []string{"/three"}; !reflect.DeepEqual(c.Runtime.CNI.BinDirs, want) {
		t.Errorf("bin_dirs %v, want %v", c.Runtime.CNI.BinDirs, want)
	}
	opts, err := runtimes["runc"].RuncOptions()
	if err != nil || opts.BinaryName != "/opt/runc" || !opts.SystemdCgroup || runtimes["runc"].RuntimeType != RuncType {
		t.Errorf("runc: %+v %v", runtimes["runc"], err)
	}
	if len(runtimes) != 2 || len(c.Files) != 3 {
		t.Errorf("%d runtimes out of %d files", len(runtimes), len(c.Files))
	}
}

func TestFaults(t *testing.T) {
	const (
		images  = "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n"
		runtime = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\"]\n"
		runc    = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"
	)
	tests := []struct {
		name, text string
		want       []string
	}{
		{"syntax", "version = 3\nroot = \"/a\nstate = 1\n", []string{":2:"}},
		{"version text", "version = \"3\"\n", []string{":1:", "versions 1 to 4"}},
		{"version 5", "root = \"/a\"\nversion = 5\n", []string{":2:", "versions 1 to 4"}},
		{"version 2 key", "version = 3\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"x\"\n", []string{":3:", "since version 3 it is plugins.\"io.containerd.cri.v1.images\".pinned_images.sandbox"}},
		{"version 3 key", "version = 4\n[grpc]\naddress = \"/x\"\n", []string{":2:", "since version 4 it is plugins.\"io.containerd.server.v1.grpc\""}},
		{"slip in version 2", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshoter = \"a\"\n", []string{":3:", `did you mean "snapshotter"?`}},
		{"slip in version 1", "[plugins.cri]\nsandbox_imag = \"a\"\n", []string{":2:", "plugins.cri.sandbox_imag", `did you mean "sandbox_image"?`}},
		{"slip in a table", "[plugins.cri.contained]\nsnapshotter = \"a\"\n", []string{":1:", `did you mean "containerd"?`}},
		{"slip in a plugin", "version = 3\n[plugins.\"io.containerd.cri.v1.image\"]\nsnapshotter = \"a\"\n", []string{":2:", `did you mean "io.containerd.cri.v1.images"?`}},
		{"type in a list", "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\"]\ncdi_spec_dirs = [\"/a\", 7]\n", []string{":3:", "element 1", "is a string, not 7"}},
		{"list for a string", "version = 3\nroot = [\"/a\"]\n", []string{":2:", "root is a string, not a list"}},
		{"string for a list", "version = 3\nimports = \"/a\"\n", []string{":2:", "imports is a list of strings"}},
		{"huge number", "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.r]\nruntime_type = \"io.containerd.runc.v2\"\noptions = { IoUid = 4294967296 }\n", []string{":4:", "IoUid", "4294967296"}},
		{"mirrors twice", images + "registry = { config_path = \"/a\", mirrors = { x = { endpoint = [\"https://x\"] } } }\n", []string{":3:", "hosts.toml"}},
		{"secret of a wrong type", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r\".auth]\npassword = 73313\n", []string{":3:", "password is a string"}},
		{"key model", images + "image_decryption = { key_model = \"cloud\" }\n", []string{":3:", "cloud"}},
		{"import that is not there", "version = 3\nimports = [\"/nowhere/x.toml\"]\n", []string{"imports", "/nowhere/x.toml"}},
		{"slip in an option of a list", "version = 3\n[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatforn = \"linux/amd64\"\n", []string{":2:", `did you mean "platform"?`}},
		{"slip", images + "snapshoter = \"native\"\n", []string{":3:", `plugins."io.containerd.cri.v1.images".snapshoter`, `did you mean "snapshotter"?`}},
		{"other case", runtime + "cni = { binDir = \"/a\" }\n", []string{":3:", `did you mean "bin_dir"?`}},
		{"wrong table", runtime + "stream_server_port = \"1\"\n", []string{":3:", `[plugins."io.containerd.grpc.v1.cri"]`}},
		{"nonsense", "version = 3\n\nxyzzy = 1\n", []string{":3:", "xyzzy", "known there"}},
		{"unknown table once", "version = 3\n[nothing]\na = 1\nb = 2\n", []string{":2:", "nothing"}},
		{"two faults", images + "snapshoter = \"a\"\nregistri = 1\n", []string{":3:", ":4:", `"registry"`}},
		{"inline table", images + "registry = { config_path = \"/a\", config_pat = \"\" }\n", []string{":3:", `did you mean "config_path"?`}},
		{"type", "version = 3\n\nroot = 7\n", []string{":3:", "root"}},
		{"type of a duration", images + "image_pull_progress_timeout = \"soon\"\n", []string{":3:", "soon"}},
		{"table for a value", "version = 3\n[root]\na = 1\n", []string{":2:"}},
		{"option slip", runc + "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc.options]\nBinaryNme = \"a\"\n", []string{":5:", `did you mean "BinaryName"?`}},
		{"option type", runc + "options = { SystemdCgroup = \"yes\" }\n", []string{":4:", "SystemdCgroup", "bool"}},
		{"sandboxer of another shim", "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.k]\nruntime_type = \"io.containerd.kata.v2\"\nsandboxer = \"shim\"\n", []string{":4:", "not supported yet"}},
		{"two cgroup drivers", runc + "options = { SystemdCgroup = true }\n[cloister]\ncgroup_driver = \"cgroupfs\"\n", []string{":4:", "cgroup_driver"}},
		{"no type", "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.x]\nsnapshotter = \"a\"\n", []string{":2:", "runtime_type"}},
		{"io_type", runc + "io_type = \"streaming\"\n", []string{":4:", "not supported yet"}},
		{"all devices alone", runc + "privileged_without_host_devices_all_devices_allowed = true\n", []string{":4:", "needs"}},
		{"default handler", runc + "[plugins.\"io.containerd.cri.v1.runtime\".containerd]\ndefault_runtime_name = \"kata\"\n", []string{":5:", `["runc"]`}},
		{"relative root", "version = 3\nroot = \"lib\"\n", []string{":2:", "absolute"}},
		{"same folders", "version = 3\nroot = \"/a\"\nstate = \"/a\"\n", []string{":3:", "same folder"}},
		{"long socket", "version = 3\nstate = \"/" + strings.Repeat("x", 120) + "\"\n", []string{"shorter"}},
		{"level", "version = 3\n[debug]\nlevel = \"loud\"\n", []string{":3:", "loud"}},
		{"ip_pref", runtime + "cni = { ip_pref = \"ipv5\" }\n", []string{":3:", "ipv5"}},
		{"seccomp", runtime + "unset_seccomp_profile = \"default\"\n", []string{":3:", "runtime/default"}},
		{"downloads", images + "max_concurrent_downloads = 0\n", []string{":3:", "above 0"}},
		{"stream port", "version = 3\n[plugins.\"io.containerd.grpc.v1.cri\"]\nstream_server_port = \"70000\"\n", []string{":3:", "70000"}},
		{"half a pair", "version = 3\n[plugins.\"io.containerd.grpc.v1.cri\"]\nenable_tls_streaming = true\nx509_key_pair_streaming = { tls_cert_file = \"/c\" }\n", []string{":4:", "both"}},
		{"network", "version = 3\n[cloister]\nnetwork = \"bridge\"\n", []string{":3:", "builtin"}},
		{"bridge", "version = 3\n[cloister.builtin_network]\nbridge = \"a-name-that-is-too-long\"\n", []string{":3:", "15"}},
		{"host bits", "version = 3\n[cloister.builtin_network]\nsubnets = [\"10.0.0.1/8\"]\n", []string{":3:", "host bits"}},
		{"two of a family", "version = 3\n[cloister.builtin_network]\nsubnets = [\"10.0.0.0/8\", \"11.0.0.0/8\"]\n", []string{":3:", "two ranges"}},
		{"import absent", "version = 3\nimports = [\"/nowhere/x.toml\"]\n", []string{"/nowhere/x.toml"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := write(t, t.TempDir(), "config.toml", tt.text)
			c, err := Load(path)
			if err == nil {
				t.Fatalf("got %+v", c)
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v has no type", err)
			}
			for _, w := range append(tt.want, path) {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q lacks %q", err, w)
				}
			}
		})
	}
}

// Files of any damage are judged in seconds, on a busy machine too.
func TestDamageIsBounded(t *testing.T) {
	var unknown, many strings.Builder
	unknown.WriteString("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n")
	for i := range 4000 {
		fmt.Fprintf(&unknown, "wrong_key_%d = 1\n", i)
		fmt.Fprintf(&many, "[plugins.cri.containerd.runtimes.r%d]\nruntime_type = \"io.containerd.runtime.v1.linux\"\n", i)
	}
	for name, text := range map[string]string{"unknown": unknown.String(), "many": many.String(),
		"deep": strings.Repeat("a.", 20000) + "b = 1", "nested": "a = " + strings.Repeat("[", 50000) + strings.Repeat("]", 50000)} {
		began := time.Now()
		_, err := Load(write(t, t.TempDir(), "c.toml", text))
		if took := time.Since(began); took > time.Minute {
			t.Errorf("%s took %v", name, took)
		}
		if err == nil || !errors.Is(err, errdefs.ErrInvalidArgument) || len(err.Error()) > 1<<16 {
			t.Errorf("%s: %.200v", name, err)
		}
	}
}

// Whoever writes the file is root; whoever reads it has its secrets.
func TestModesOfFiles(t *testing.T) {
	path := write(t, t.TempDir(), "c.toml", "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.r.auth]\nusername = \"u\"\npassword = \"hunter2\"\n")
	for mode, want := range map[os.FileMode][]string{0o600: nil, 0o644: {"password is a secret"}, 0o666: {"password is a secret", "can be written by others"}, 0o602: {"can be written"}} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		var modes []string
		for _, w := range c.Warnings {
			if strings.Contains(w.Message, "mode") {
				modes = append(modes, w.String())
			}
		}
		if len(modes) != len(want) {
			t.Errorf("mode %o: %q, want %q", mode, modes, want)
		}
		for _, w := range want {
			warned(t, c, w)
		}
		if text := fmt.Sprintf("%v %+v %#v", c, c, c); strings.Contains(text, "hunter2") {
			t.Errorf("the password is printed: %s", text)
		}
	}
}

func TestFaultsOfOneTableAreOne(t *testing.T) {
	_, err := Load(write(t, t.TempDir(), "c.toml", "version = 3\n[nothing]\na = 1\nb = 2\n"))
	if n := strings.Count(err.Error(), "c.toml:"); n != 1 {
		t.Errorf("%d faults in %q, want 1", n, err)
	}
}

// Every key that is said to be idle has to be there.
func TestIdleKeysExist(t *testing.T) {
	for _, k := range idleKeys() {
		path := slices.Clone(k.path)
		if i := slices.Index(path, "*"); i >= 0 {
			path[i] = "x"
		}
		if !isKnown(path) {
			t.Errorf("%s: no such key", k.path)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(everyKey)
	f.Add("version = 3\n[[plugins]]\na.\"b\\u0041\" = {c = [1, {d = 2}]}\n")
	f.Add("version = 2\n\"\" = 1979-05-27\n")
	f.Fuzz(func(t *testing.T, text string) {
		l := newLoader()
		if _, _, err := l.decode("fuzz.toml", []byte(text), 0); err != nil {
			if !strings.Contains(err.Error(), "fuzz.toml:") {
				t.Errorf("%q does not name the file", err)
			}
			return
		}
		c, err := l.finish()
		if err == nil && (c.Root == "" || c.State == "" || c.Address == "" || c.LogLevel == "") {
			t.Errorf("accepted with an empty place: %+v", c)
		}
	})
}
