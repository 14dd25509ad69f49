package config

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func testFiles(t *testing.T) []string {
	t.Helper()
	blocks, err := filepath.Glob("testdata/*/*.toml")
	if err != nil || len(blocks) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	return blocks
}

// A migrated file means what the old one means, and migrating it again changes
// nothing.
func TestMigrateKeepsTheMeaning(t *testing.T) {
	for _, file := range testFiles(t) {
		var out, again bytes.Buffer
		if err := Migrate(&out, file); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		migrated := write(t, t.TempDir(), "new.toml", out.String())
		before, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		after, err := Load(migrated)
		if err != nil {
			t.Errorf("%s: %v in\n%s", file, err, out.String())
			continue
		}
		same(t, file, valuesOnly(after), valuesOnly(before))
		if err := Migrate(&again, migrated); err != nil {
			t.Fatal(err)
		}
		if withoutComments(again.String()) != withoutComments(out.String()) {
			t.Errorf("%s: migrating twice gives\n%s\nafter\n%s", file, again.String(), out.String())
		}
	}
}

func withoutComments(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "#") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func TestMigratePrintsWhatWasSet(t *testing.T) {
	file := write(t, t.TempDir(), "c.toml", `plugin_dir = "/x"
[plugins.cri]
sandbox_image = "a/pause:1"
systemd_cgroup = true
[plugins.cri.cni]
bin_dir = "/b"
`)
	var out bytes.Buffer
	if err := Migrate(&out, file); err != nil {
		t.Fatal(err)
	}
	want := `# plugin_dir (line 1) has no effect: Cloister loads no plugins into itself
version = 4

[plugins."io.containerd.cri.v1.images".pinned_images]
# was plugins.cri.sandbox_image
sandbox = "a/pause:1"

[plugins."io.containerd.cri.v1.runtime".cni]
# was plugins.cri.cni.bin_dir
bin_dirs = ["/b"]

[cloister]
# was plugins.cri.systemd_cgroup
# plugins.cri.systemd_cgroup is deprecated: set SystemdCgroup in the options of each handler, or cgroup_driver in [cloister]
cgroup_driver = "systemd"
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// What dump prints is a file that means the same, secrets apart.
func TestDumpMeansTheSame(t *testing.T) {
	for _, file := range testFiles(t) {
		c, values, err := Inspect(file)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := WriteValues(&out, values); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), "paste output") {
			t.Errorf("%s: the dump has a password:\n%s", file, out.String())
		}
		again, err := Load(write(t, t.TempDir(), "dump.toml", strings.ReplaceAll(out.String(), redacted, "paste output from jq")))
		if err != nil {
			t.Errorf("%s: %v in\n%s", file, err, out.String())
			continue
		}
		c.Plugins.GRPC, again.Plugins.GRPC = GRPCServer{}, GRPCServer{}
		same(t, file, valuesOnly(again), valuesOnly(c))
	}
}

func TestDumpTellsTheOrigin(t *testing.T) {
	dir := t.TempDir()
	main := write(t, dir, "config.toml", "version = 2\nimports = [\"more/*.toml\"]\nroot = \"/r\"\nstate = \"/s\"\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"x\"\n"+
		"[plugins.\"io.containerd.grpc.v1.cri\".registry.headers]\nAuthorization = [\"Basic c2VjcmV0\"]\n")
	drop := write(t, dir, "more/a.toml", "root = \"/r2\"\n")
	_, values, err := Inspect(main)
	if err != nil {
		t.Fatal(err)
	}
	from := map[string]Value{}
	for _, v := range values {
		from[v.Key] = v
	}
	same(t, "root", from["root"].From, drop+":1")
	same(t, "state", from["state"].From, main+":4")
	sandbox := from[`plugins."io.containerd.cri.v1.images".pinned_images.sandbox`]
	same(t, "sandbox", []string{sandbox.From, sandbox.Wrote}, []string{main + ":6", `plugins."io.containerd.grpc.v1.cri".sandbox_image`})
	same(t, "socket", from[`plugins."io.containerd.server.v1.grpc".address`].From, "derived")
	same(t, "level", from["debug.level"].From, "default")
	same(t, "header", from[`plugins."io.containerd.cri.v1.images".registry.headers.Authorization`].Value, `"REDACTED"`)
}

func TestDefaultFileIsTheDefault(t *testing.T) {
	var out bytes.Buffer
	if err := WriteDefault(&out); err != nil {
		t.Fatal(err)
	}
	c, err := Load(write(t, t.TempDir(), "c.toml", out.String()))
	if err != nil {
		t.Fatalf("%v in\n%s", err, out.String())
	}
	want := Default()
	want.Plugins.GRPC.Address = want.Address
	same(t, "defaults", valuesOnly(c), want)
}

func TestExplain(t *testing.T) {
	tests := []struct{ ask, key, note string }{
		{"max_concurrent_unpacks", `plugins."io.containerd.transfer.v1.local".max_concurrent_unpacks`, ""},
		{"runtimes.kata.runtime_type", `plugins."io.containerd.cri.v1.runtime".containerd.runtimes.NAME.runtime_type`, ""},
		{"sandbox_image", `plugins."io.containerd.cri.v1.images".pinned_images`, `now it is plugins."io.containerd.cri.v1.images".pinned_images.sandbox`},
		{`plugins.cri.containerd.snapshotter`, `plugins."io.containerd.cri.v1.images".snapshotter`, "version 1"},
		{"grpc.address", `plugins."io.containerd.server.v1.grpc".address`, "version 3"},
		{"runtime_engine", `plugins."io.containerd.cri.v1.runtime".containerd.runtimes.NAME.runtime_engine`, "BinaryName"},
		{"BinaryName", "BinaryName", ""},
		{"systemd_cgroup", `plugins."io.containerd.grpc.v1.cri".systemd_cgroup`, "cgroup_driver"},
	}
	for _, tt := range tests {
		found, err := Explain(tt.ask)
		if err != nil || len(found) != 1 {
			t.Errorf("%s: %+v, %v", tt.ask, found, err)
			continue
		}
		if found[0].Key.Key != tt.key || !strings.Contains(found[0].Note, tt.note) {
			t.Errorf("%s: got %s, %s", tt.ask, found[0].Key.Key, found[0].Note)
		}
	}
	for table, key := range map[string]string{"cni": "bin_dirs", `"io.containerd.nri.v1.nri"`: "socket_path", "runtimes.kata": "runtime_type"} {
		found, err := Explain(table)
		if err != nil || len(found) < 5 || !strings.HasSuffix(found[0].Key.Key, "."+key) && !strings.HasSuffix(found[1].Key.Key, "."+key) {
			t.Errorf("table %s: %+v, %v", table, found, err)
		}
	}
	if _, err := Explain("snapshoter"); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), `"snapshotter"`) {
		t.Errorf("got %v", err)
	}
	if _, err := Explain("a b"); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("got %v", err)
	}
}

// Every key is explained: it has a meaning, and its table is a key's.
func TestReferenceIsWhole(t *testing.T) {
	all, err := Reference()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range all {
		if k.Meaning == "" || k.Type == "" || k.Since == "" {
			t.Errorf("%+v lacks something", k)
		}
	}
	if len(all) < 200 {
		t.Errorf("%d keys only", len(all))
	}
}

func FuzzMigrate(f *testing.F) {
	for _, file := range []string{"reference", "rune-v1", "kata-handlers-v1", "kata-untrusted-v1", "registry-mirrors"} {
		b, err := os.ReadFile("testdata/blocks/" + file + ".toml")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := write(t, t.TempDir(), "c.toml", text)
		var out bytes.Buffer
		if err := Migrate(&out, path); err != nil {
			return
		}
		before, err := Load(path)
		if err != nil {
			return // another judge than the form
		}
		after, err := Load(write(t, t.TempDir(), "new.toml", out.String()))
		if err != nil {
			t.Fatalf("%v in\n%s", err, out.String())
		}
		if before.Root != after.Root || before.Address != after.Address || before.Images.Snapshotter != after.Images.Snapshotter ||
			len(before.Runtime.Containerd.Runtimes) != len(after.Runtime.Containerd.Runtimes) {
			t.Errorf("%+v became %+v by\n%s", before, after, out.String())
		}
	})
}

func FuzzExplain(f *testing.F) {
	for _, k := range []string{"snapshotter", `plugins."io.containerd.grpc.v1.cri".sandbox_image`, "cni", "runtimes.x.options.BinaryName", "a=1\nb", `"\u0041"`, "'"} {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, key string) {
		found, err := Explain(key)
		if (err == nil) != (len(found) > 0) {
			t.Errorf("%q: %d keys and %v", key, len(found), err)
		}
	})
}
