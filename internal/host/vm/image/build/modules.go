package build

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"cloister.dev/internal/host/vm/image"
)

// bootModules are what a machine needs to be a pod, for each type of machine.
// Those that a kernel has built in are no modules and no loss.
func bootModules() map[string][]string {
	always := []string{"virtio_console", "virtio_net"}
	return map[string][]string{
		"microvm": append([]string{"virtio_mmio"}, always...),
		"q35":     append([]string{"virtio_pci"}, always...),
	}
}

// containerModules are what the agent loads for the first container.
func containerModules() []string { return []string{"virtiofs"} }

// laterModules are loaded when they are wanted: disks, file systems on them,
// resizing, vsock, and what pods do with the network inside their own kernel.
func laterModules() []string {
	return []string{"virtio_scsi", "sd_mod", "virtio_mem", "virtio_balloon", "vmw_vsock_virtio_transport", "overlay", "erofs", "loop", "tun", "af_packet",
		"dummy", "bridge", "veth", "vxlan", "macvlan", "wireguard", "sch_htb", "sch_ingress", "cls_u32", "act_mirred",
		"x_tables", "ip_tables", "ip6_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "ip6table_filter", "ip6table_nat",
		"nf_tables", "nft_compat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_reject_inet",
		"xt_conntrack", "xt_nat", "xt_MASQUERADE", "xt_REDIRECT", "xt_addrtype", "xt_comment", "xt_mark", "xt_multiport", "xt_owner", "xt_tcpudp", "xt_TPROXY"}
}

// kernelModules is the folder of a kernel's modules.
type kernelModules struct {
	paths   map[string]string // name to file
	builtin map[string]bool
}

// moduleSuffixes are how module files end; the last ones are compressed.
var moduleSuffixes = [...]string{".ko", ".ko.zst", ".ko.gz"}

func findModules(dir string) (kernelModules, error) {
	m := kernelModules{paths: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		if name, ok := moduleName(path); ok {
			m.paths[name] = path
		}
		return nil
	})
	if err != nil {
		return m, fmt.Errorf("look for kernel modules: %w", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := moduleName(strings.TrimSpace(line)); ok {
			m.builtin[name] = true
		}
	}
	return m, nil
}

// moduleName is what the kernel calls the module in a file.
func moduleName(path string) (string, bool) {
	base := filepath.Base(path)
	for _, s := range moduleSuffixes {
		if name, ok := strings.CutSuffix(base, s); ok {
			return strings.ReplaceAll(name, "-", "_"), true
		}
	}
	return "", false
}

// picked are the modules that go into a guest.
type picked struct {
	data    map[string][]byte   // by name
	needs   map[string][]string // by name, all of them, in the order of loading
	aliases map[string][]string // by name
}

// pick takes modules and everything that they need. A module that the kernel
// neither has nor has built in is an error only when required.
func (m kernelModules) pick(p *picked, name string, required bool) error {
	if _, done := p.needs[name]; done {
		return nil
	}
	path, ok := m.paths[name]
	if !ok {
		if m.builtin[name] || !required {
			return nil
		}
		return fmt.Errorf("the kernel has no module %s: %w", name, errdefs.ErrNotFound)
	}
	data, err := readModule(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	data = unsigned(data)
	direct, aliases, err := moduleInfo(data)
	if err != nil {
		return fmt.Errorf("read what %s needs: %w", path, err)
	}
	p.aliases[name] = aliases
	p.needs[name] = nil // ends circles
	var all []string
	for _, d := range direct {
		if err := m.pick(p, d, true); err != nil {
			return fmt.Errorf("module %s needs %s: %w", name, d, err)
		}
		for _, n := range append(slices.Clone(p.needs[d]), d) {
			if p.data[n] != nil && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	p.data[name], p.needs[name] = data, all
	return nil
}

// readModule gives a module as the kernel loads it without help.
func readModule(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil || strings.HasSuffix(path, ".ko") {
		return b, err
	}
	if strings.HasSuffix(path, ".zst") {
		d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(b, nil)
	}
	return decompress(b)
}

// signatureMark ends a module that is signed; before it are twelve bytes with
// the signature's length as the last four, and before those the signature.
const signatureMark = "~Module signature appended~\n"

// unsigned takes the signature off a module. Whoever can change a module in a
// guest's file can change the kernel there too, so checking it protects nobody,
// and it costs a machine that is emulated a good part of its start.
func unsigned(module []byte) []byte {
	const info = 12
	body, ok := bytes.CutSuffix(module, []byte(signatureMark))
	if !ok || len(body) < info {
		return module
	}
	size := int64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if size > int64(len(body)-info) {
		return module
	}
	return body[:int64(len(body)-info)-size]
}

// moduleInfo is what depmod would find: the modules that one says it needs, and
// the names by which the kernel may ask for it. Patterns, which are those of
// hardware, are left out.
func moduleInfo(module []byte) (needs, aliases []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("it has no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch {
		case key == "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					needs = append(needs, strings.ReplaceAll(name, "-", "_"))
				}
			}
		case key == "alias" && !strings.ContainsAny(value, "*?["):
			aliases = append(aliases, value)
		}
	}
	return needs, aliases, nil
}

// moduleFiles gives the modules their places in the guest.
func (p picked) place(t tree, version string) map[string]image.Module {
	all := map[string]image.Module{}
	for _, name := range slices.Sorted(maps.Keys(p.data)) {
		path := filepath.Join("/lib/modules", version, name+".ko")
		t.file(path, 0o644, p.data[name])
		all[name] = image.Module{Path: path, Needs: p.needs[name], Aliases: p.aliases[name]}
	}
	return all
}

// bootOrder lists the files to load for a type of machine.
func bootOrder(modules map[string]image.Module, wanted []string) []string {
	var paths []string
	for _, name := range wanted {
		m, ok := modules[name]
		if !ok {
			continue
		}
		for _, n := range append(slices.Clone(m.Needs), name) {
			if path := modules[n].Path; !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}
