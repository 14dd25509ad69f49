package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cloister.dev/internal/config"
	"cloister.dev/internal/tee/backend"
)

// The defaults of the file and those of the backends are the same.
func TestBackendDefaults(t *testing.T) {
	got, want := backendOptions(config.Default().DevicePlugin), backend.Defaults()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestOriginalFlags(t *testing.T) {
	tests := map[string]string{
		"device-plugin -precision 1024 -internal 30":     "device-plugin --precision 1024 --health-interval 30",
		"device-plugin run -precision=1024 -internal=0":  "device-plugin run --precision=1024 --health-interval=0",
		"device-plugin --internal 5 --precision 512 -h":  "device-plugin --health-interval 5 --precision 512 -h",
		"exec x -- prog -precision 3":                    "exec x -- prog -precision 3",
		"device-plugin status -o json":                   "device-plugin status -o json",
		"run --name device-plugin image -internal -c -l": "run --name device-plugin image -internal -c -l",
	}
	for line, want := range tests {
		if got := strings.Join(originalFlags(strings.Fields(line)), " "); got != want {
			t.Errorf("%s:\n got %s\nwant %s", line, got, want)
		}
	}
}

func TestSeconds(t *testing.T) {
	tests := map[string]time.Duration{"60": time.Minute, "0": 0, "1m30s": 90 * time.Second, "250ms": 250 * time.Millisecond, "-1": -1, "abc": -1, "": -1, "5 s": -1}
	for text, want := range tests {
		var s seconds
		err := s.Set(text)
		if (err != nil) != (want < 0) || err == nil && time.Duration(s) != want {
			t.Errorf("%q: %v, %v; want %v", text, time.Duration(s), err, want)
		}
	}
}

func TestDevicePluginLine(t *testing.T) {
	tests := []struct {
		line, says string
		code       int
	}{
		{"device-plugin run --precision 511", "precision is 511 KiB", 2},
		{"device-plugin run --precision abc", "precision", 2},
		{"device-plugin run --precision -5", "precision is -5 KiB", 2},
		{"device-plugin run --precision 99999999999999999999", "precision", 2},
		{"device-plugin run --health-interval soon", "written as 30s", 2},
		{"device-plugin run --backend unobtainium", "unobtainium", 2},
		{"device-plugin run --kubelet-dir relative", "absolute", 2},
		{"device-plugin run --kubeconfig relative", "absolute", 2},
		{"device-plugin run extra", "extra", 2},
		{"device-plugin run --config /no/such/file", "no such file", 2},
		{"device-plugin status --status-socket /no/such/socket", "no device plugin is running", 1},
		{"device-plugin status -o xml", "xml", 2},
		{"device-plugin manifest", "backend", 2},
		{"device-plugin manifest --backend unobtainium", "unobtainium", 2},
		{"device-plugin manifest --backend trustzone --precision 100", "512", 2},
	}
	for _, tt := range tests {
		t.Run(tt.line, func(t *testing.T) {
			a := &app{}
			root := a.root()
			root.SetArgs(originalFlags(strings.Fields(tt.line)))
			root.SetOut(&strings.Builder{})
			code, text := judge(root.ExecuteContext(t.Context()))
			if code != tt.code || !strings.Contains(text, tt.says) {
				t.Errorf("%d, %q; want %d with %q", code, text, tt.code, tt.says)
			}
		})
	}
}

// Handlers are not held up by what they do not need, nor without a plugin.
func TestReadyWithoutPlugin(t *testing.T) {
	var d *devicePlugin
	if err := d.ready("runc"); err != nil || d.conditions() != nil {
		t.Errorf("without a plugin: %v, %v", err, d.conditions())
	}
}

func TestNeedsIsLookedFor(t *testing.T) {
	cfg := config.Default()
	if o := agentOptions(cfg); o.PluginDir != "/var/lib/kubelet/device-plugins" || slices.Contains(o.Backends, "sim") || o.StatusSocket != "/run/cloister/device-plugin.sock" {
		t.Errorf("default options: %+v", o)
	}
	cfg.DevicePlugin.Needs = map[string]string{"runc": "sgx"}
	if err := cfg.Validate(); err == nil {
		t.Error("needs without enabled was taken")
	}
	cfg.DevicePlugin.Enabled = true
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
}
