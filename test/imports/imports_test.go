// Package imports keeps the rules of the house: which room may import which
// (docs/architecture.md), and how long a file or a function may get.
package imports

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "cloister.dev/"

// goPackage is what "go list -json" tells of a package.
type goPackage struct {
	ImportPath                         string
	Dir                                string
	GoFiles                            []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// room of the package: its path in the module.
func (p goPackage) room() string { return strings.TrimPrefix(p.ImportPath, module) }

// rule forbids imports. Paths are prefixes of rooms: "internal/host" stands
// for everything beneath it too.
type rule struct {
	from   string
	except []string // rooms under from that the rule leaves alone
	to     []string
	why    string
}

func rules() []rule {
	upper := []string{"internal/cri", "internal/pod", "internal/image"}
	return []rule{
		{from: "", to: []string{"cmd"}, why: "programs are the outermost room"},
		{from: "internal/pod", to: []string{"internal/cri", "internal/stream"}, why: "arrows go cri → pod → {image, network, oci, shim}"},
		{from: "internal/image", to: []string{"internal/cri", "internal/pod", "internal/network", "internal/oci", "internal/shim", "internal/stream"}, why: "the rooms beneath pod do not know each other"},
		{from: "internal/network", to: append(slices.Clone(upper), "internal/oci", "internal/shim", "internal/stream"), why: "the rooms beneath pod do not know each other"},
		{from: "internal/oci", to: append(slices.Clone(upper), "internal/network", "internal/shim", "internal/stream"), why: "the rooms beneath pod do not know each other"},
		{from: "internal/shim", to: append(slices.Clone(upper), "internal/network", "internal/oci", "internal/stream"), why: "the rooms beneath pod do not know each other"},
		{from: "internal/nri", to: append(slices.Clone(upper), "internal/network", "internal/oci", "internal/shim", "internal/stream"), why: "the rooms beneath pod do not know each other"},
		{from: "internal/telemetry", to: append(slices.Clone(upper), "internal/network", "internal/nri", "internal/oci", "internal/shim", "internal/stream"), why: "it is told names and durations"},
		{from: "internal/stream", to: append(slices.Clone(upper), "internal/network", "internal/oci", "internal/shim"), why: "streaming serves whatever Runtime it is given"},
		{from: "internal/host", to: append(slices.Clone(upper), "internal/shim", "internal/network", "internal/oci", "internal/stream"), why: "the sandbox host meets the daemon in the shim protocol alone"},
		{from: "internal/cri", to: []string{"internal/network", "internal/oci", "internal/host"}, why: "CRI translates; what it needs of them it asks of pod"},
		{from: "internal/client", to: []string{"internal/cri", "internal/pod", "internal/image", "internal/network", "internal/oci", "internal/shim", "internal/stream", "internal/host", "internal/config"}, why: "the command line speaks CRI over the socket, like any client"},
		{from: "internal", except: []string{"internal/host", "internal/guest"}, to: []string{"internal/host"}, why: "the daemon meets the sandbox host in the shim protocol alone"},
		{from: "internal", except: []string{"internal/config"}, to: []string{"internal/config"}, why: "configuration is handed down as plain structs"},
		{from: "internal/tee", to: append(slices.Clone(upper), "internal/network", "internal/oci", "internal/shim", "internal/stream", "internal/client"), why: "the inventory of the machine knows nothing of pods"},
		{from: "internal/osutil", to: []string{"internal", "api"}, why: "osutil is a leaf"},
		{from: "api", to: []string{"internal"}, why: "api holds protocols and nothing else"},
	}
}

// outside are rules on modules of others.
var outside = []rule{
	{from: "internal", except: []string{"internal/config"}, to: []string{"github.com/pelletier/go-toml", "github.com/BurntSushi/toml"}, why: "only cmd and config know TOML"},
	{from: "internal", to: []string{"github.com/spf13/cobra"}, why: "only cmd knows the command line"},
	{from: "internal/host", to: []string{"k8s.io/"}, why: "the sandbox host knows nothing of Kubernetes"},
	{from: "internal", except: []string{"internal/tee/teec/native"}, to: []string{"github.com/ebitengine/purego"}, why: "a loaded library does what it likes to its process"},
	{from: "cmd/cloister", to: []string{"cloister.dev/internal/tee/teec/native"}, why: "a loaded library does what it likes to its process"},
	{from: "internal/client", to: []string{"github.com/containerd/containerd/v2"}, why: "the client needs CRI alone"},
}

func TestImportRules(t *testing.T) {
	packages := list(t)
	all := append(rules(), outside...)
	for _, p := range packages {
		for _, r := range all {
			if !r.governs(p.room()) {
				continue
			}
			for _, imp := range p.Imports {
				if to := r.forbids(p.room(), imp); to != "" {
					t.Errorf("%s may not import %s (nothing under %s may import %s): %s",
						p.ImportPath, imp, orModule(r.from), to, r.why)
				}
			}
		}
	}
}

// The shim is started once per node and the agent once per machine, and their
// memory is counted: what they carry of others' worlds would be paid for nothing.
func TestShimAndAgentAreSmall(t *testing.T) {
	for _, p := range list(t) {
		heavy := map[string][]string{
			"cmd/cloister-shim": {"k8s.io/cri-api", "go.etcd.io/bbolt", "github.com/containernetworking/"},
			// In an emulated machine each of these costs a few milliseconds at the start.
			"cmd/cloister-agent": {"github.com/containerd/containerd/", "github.com/opencontainers/image-spec", "cloister.dev/internal/config", "google.golang.org/grpc/internal/transport"},
		}[p.room()]
		for _, dep := range p.Deps {
			for _, h := range heavy {
				if strings.HasPrefix(dep, h) {
					t.Errorf("%s carries %s", p.room(), dep)
				}
			}
		}
	}
}

func TestRulesCatch(t *testing.T) {
	tests := []struct {
		room, imp string
		caught    bool
	}{
		{"internal/pod", "cloister.dev/internal/cri", true},
		{"internal/cri", "cloister.dev/internal/pod", false},
		{"internal/host/container", "cloister.dev/internal/image", true},
		{"internal/host/container", "cloister.dev/internal/host/proc", false},
		{"internal/network/cni", "cloister.dev/internal/network/link", false},
		{"internal/networking", "cloister.dev/internal/pod", false},
		{"internal/shim", "cloister.dev/internal/host", true},
		{"internal/config", "github.com/pelletier/go-toml/v2", false},
		{"internal/image", "github.com/pelletier/go-toml/v2", true},
		{"test/demo", "cloister.dev/cmd/cloister", true},
		{"cmd/cloister", "cloister.dev/internal/config", false},
	}
	for _, tt := range tests {
		caught := false
		for _, r := range append(rules(), outside...) {
			caught = caught || r.governs(tt.room) && r.forbids(tt.room, tt.imp) != ""
		}
		if caught != tt.caught {
			t.Errorf("%s importing %s: caught is %v, want %v", tt.room, tt.imp, caught, tt.caught)
		}
	}
}

func (r rule) governs(room string) bool {
	return within(room, r.from) && !slices.ContainsFunc(r.except, func(e string) bool { return within(room, e) })
}

// forbids gives the forbidden prefix that an import falls under, or "".
func (r rule) forbids(room, imp string) string {
	path, ours := strings.CutPrefix(imp, module)
	for _, to := range r.to {
		foreign := strings.Contains(to, ".")
		if foreign != ours && within(path, strings.TrimSuffix(to, "/")) && !(ours && within(room, to)) {
			return to
		}
	}
	return ""
}

// within tells whether a path is a prefix's own or beneath it.
func within(path, prefix string) bool {
	return prefix == "" || path == prefix || strings.HasPrefix(path, prefix+"/")
}

func orModule(from string) string {
	if from == "" {
		return module + "…"
	}
	return from
}

func list(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Imports,TestImports,XTestImports,Deps", module+"...")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 5 {
		t.Fatalf("go list knows %d packages of the module", len(all))
	}
	return all
}
