package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
)

// confNetwork is one network of the configuration folder.
type confNetwork struct {
	file   string
	ifName string // in the pods
	list   *libcni.NetworkConfigList
	// raw is the list with its plugins inlined, as it is kept for DEL.
	raw json.RawMessage
}

// maxConfSize bounds a configuration file; real ones have a few kilobytes.
const maxConfSize = 1 << 20

// loadFolder reads the first files of the folder by name, at most max (0: all).
// A file that cannot be read fails the whole, so that a typo never makes pods
// join another network than the one meant.
func loadFolder(dir string, max int) ([]confNetwork, error) {
	files, err := confFiles(dir)
	if err != nil {
		return nil, fmt.Errorf("read cni config folder: %w", err)
	}
	if max > 0 && len(files) > max {
		files = files[:max]
	}
	networks := make([]confNetwork, 0, len(files))
	for i, file := range files {
		list, err := loadFile(file)
		if err != nil {
			return nil, fmt.Errorf("cni config %s: %w", file, err)
		}
		raw, err := inlined(list)
		if err != nil {
			return nil, fmt.Errorf("cni config %s: %w", file, err)
		}
		networks = append(networks, confNetwork{file: file, ifName: fmt.Sprintf("eth%d", i), list: list, raw: raw})
	}
	return networks, nil
}

// confFiles lists the configuration files by name. A folder that is not there
// has none.
func confFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries { // sorted by name
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
			if !e.IsDir() {
				files = append(files, filepath.Join(dir, e.Name()))
			}
		}
	}
	return files, nil
}

func loadFile(file string) (*libcni.NetworkConfigList, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxConfSize {
		return nil, fmt.Errorf("%d bytes are too many: %w", st.Size(), errdefs.ErrInvalidArgument)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	list, err := parseConf(data, filepath.Ext(file) == ".conflist")
	if err != nil {
		return nil, err
	}
	if !list.LoadOnlyInlinedPlugins && filepath.Ext(file) == ".conflist" {
		// Plugins of the list may lie beside it, in a folder of its name.
		more, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(file), list.Name)
		if err != nil {
			return nil, err
		}
		list.Plugins = append(list.Plugins, more...)
	}
	if len(list.Plugins) == 0 {
		return nil, fmt.Errorf("it has no plugins: %w", errdefs.ErrInvalidArgument)
	}
	return list, nil
}

// parseConf reads a list, or a single plugin's configuration as a list of one.
func parseConf(data []byte, isList bool) (*libcni.NetworkConfigList, error) {
	if !isList {
		var shape struct {
			Type    string            `json:"type"`
			Plugins []json.RawMessage `json:"plugins"`
		}
		if err := json.Unmarshal(data, &shape); err != nil {
			return nil, fmt.Errorf("parse: %w", errors.Join(err, errdefs.ErrInvalidArgument))
		}
		if shape.Type == "" {
			hint := ""
			if len(shape.Plugins) > 0 {
				hint = "; it has plugins: should its name end in .conflist?"
			}
			return nil, fmt.Errorf("it has no type%s: %w", hint, errdefs.ErrInvalidArgument)
		}
	}
	list, err := parseList(data, isList)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if e := utils.ValidateNetworkName(list.Name); e != nil {
		return nil, fmt.Errorf("name %.80q: %w: %w", list.Name, e, errdefs.ErrInvalidArgument)
	}
	for i, p := range list.Plugins {
		if strings.ContainsRune(p.Network.Type, '/') {
			return nil, fmt.Errorf("plugin %d: type %.80q has a slash: %w", i, p.Network.Type, errdefs.ErrInvalidArgument)
		}
	}
	return list, nil
}

func parseList(data []byte, isList bool) (*libcni.NetworkConfigList, error) {
	if !isList {
		conf, err := libcni.NetworkPluginConfFromBytes(data)
		if err != nil {
			return nil, err
		}
		return libcni.ConfListFromConf(conf) //nolint:staticcheck // nodes have such files, and containerd reads them
	}
	var shape map[string]json.RawMessage
	if err := json.Unmarshal(data, &shape); err != nil {
		return nil, err
	}
	// The library refuses a list without plugins unless it may look beside it.
	if _, ok := shape["plugins"]; !ok {
		shape["plugins"] = json.RawMessage("[]")
		data, _ = json.Marshal(shape)
	}
	return libcni.NetworkConfFromBytes(data)
}

// inlined writes a list that stands alone.
func inlined(list *libcni.NetworkConfigList) (json.RawMessage, error) {
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(list.Bytes, &all); err != nil {
		return nil, err
	}
	plugins := make([]json.RawMessage, 0, len(list.Plugins))
	for _, p := range list.Plugins {
		plugins = append(plugins, p.Bytes)
	}
	var err error
	if all["plugins"], err = json.Marshal(plugins); err != nil {
		return nil, err
	}
	all["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	return json.Marshal(all)
}

// types lists the plugin programs that networks name, IPAM included.
func pluginTypes(networks []confNetwork) []string {
	var out []string
	for _, n := range networks {
		for _, p := range n.list.Plugins {
			out = append(out, p.Network.Type)
			if t := p.Network.IPAM.Type; t != "" {
				out = append(out, t)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
