package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runConfig runs a command and gives its exit code and what it printed.
func runConfig(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	root := (&app{stdout: file, stderr: file}).root()
	root.SetArgs(append([]string{"config"}, args...))
	code, sentence := judge(root.ExecuteContext(t.Context()))
	text, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return code, string(text) + sentence
}

func TestConfigCommands(t *testing.T) {
	dir := t.TempDir()
	good, bad, old := filepath.Join(dir, "good.toml"), filepath.Join(dir, "bad.toml"), filepath.Join(dir, "old.toml")
	for path, text := range map[string]string{
		good: "version = 4\n[debug]\nlevel = \"warn\"\n",
		bad:  "version = 4\n[debug]\nlevl = \"warn\"\n",
		old:  "[plugins.cri]\nsandbox_image = \"x\"\nsystemd_cgroup = true\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		args []string
		code int
		want []string
	}{
		{[]string{"validate", good}, 0, []string{good + ": valid"}},
		{[]string{"validate", good, bad, old}, 1, []string{good + ": valid", bad + ":3: unknown key debug.levl; did you mean \"level\"?", bad + ": refused", "warning: " + old + ":3: plugins.cri.systemd_cgroup is deprecated"}},
		{[]string{"validate", "-o", "json", bad}, 1, []string{`"valid": false`, `did you mean`}},
		{[]string{"validate", filepath.Join(dir, "none")}, 1, []string{"no such file"}},
		{[]string{"dump", "-c", good}, 0, []string{`level = "warn" # ` + good + ":3", `network = "cni" # default`}},
		{[]string{"dump", "-c", good, "-o", "yaml"}, 0, []string{"key: debug.level"}},
		{[]string{"dump", "-c", bad}, 1, []string{"levl"}},
		{[]string{"migrate", old}, 0, []string{"version = 4", `sandbox = "x"`, `cgroup_driver = "systemd"`}},
		{[]string{"migrate", bad}, 1, []string{"levl"}},
		{[]string{"migrate"}, 2, []string{"--help"}},
		{[]string{"explain", "systemd_cgroup"}, 0, []string{"was dropped", "cgroup_driver"}},
		{[]string{"explain", "debug.level"}, 0, []string{"type", "string", `"info"`, "containerd 1.0", "when the file changes"}},
		{[]string{"explain", "BinaryName"}, 0, []string{"option of", "io.containerd.runc.v2"}},
		{[]string{"explain", "bogus_key"}, 1, []string{"there is no key"}},
		{[]string{"default"}, 0, []string{"version = 4", "# One of debug, info, warn, error.", `level = "info"`}},
		{[]string{"default", "x"}, 2, []string{"--help"}},
	}
	for _, tt := range tests {
		code, out := runConfig(t, tt.args...)
		if code != tt.code {
			t.Errorf("%v: exit code %d, want %d: %s", tt.args, code, tt.code, out)
		}
		for _, w := range tt.want {
			if !strings.Contains(out, w) {
				t.Errorf("%v: %q is not in\n%s", tt.args, w, out)
			}
		}
	}
}
