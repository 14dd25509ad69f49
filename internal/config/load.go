package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
)

// maxFileBytes bounds one file: a configuration is written by people.
const maxFileBytes = 4 << 20

// Load reads the file at path with its drop-ins. The empty path means
// DefaultPath with conf.d beside it, and that neither has to exist.
func Load(path string) (Config, error) {
	l := loader{config: Default(), where: map[string]place{}}
	var err error
	if path == "" {
		err = l.loadDefault(DefaultPath)
	} else {
		err = l.loadFile(path, true)
	}
	if err != nil {
		return Config{}, err
	}
	return l.finish()
}

// loader gathers the files of one configuration.
type loader struct {
	config    Config
	addressed bool             // some file set the socket's path
	where     map[string]place // dotted key → where it was set last
}

func (l *loader) loadDefault(path string) error {
	if err := l.loadFile(path, true); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return l.loadGlob(filepath.Join(filepath.Dir(path), "conf.d", "*.toml"))
}

// loadFile reads one file and then what it imports: an import overrides the
// file that names it. A file that was read already is not read again.
func (l *loader) loadFile(path string, main bool) error {
	path = filepath.Clean(path)
	if slices.Contains(l.config.Files, path) {
		return nil
	}
	data, err := readFile(path)
	if err != nil {
		return err
	}
	l.config.Files = append(l.config.Files, path)
	imports, err := l.decode(path, data, main)
	if err != nil {
		return err
	}
	for _, pattern := range imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(path), pattern)
		}
		if err := l.loadGlob(pattern); err != nil {
			return fmt.Errorf("%s: imports: %w", path, err)
		}
	}
	return nil
}

// loadGlob reads the files of a pattern in the order of their names. A path
// without wildcards has to exist.
func (l *loader) loadGlob(pattern string) error {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return fmt.Errorf("pattern %q: %w: %w", pattern, err, errdefs.ErrInvalidArgument)
	}
	if len(files) == 0 && !hasWildcard(pattern) {
		files = []string{pattern}
	}
	for _, f := range files {
		if err := l.loadFile(f, false); err != nil {
			return err
		}
	}
	return nil
}

func hasWildcard(pattern string) bool {
	return slices.ContainsFunc([]rune(pattern), func(r rune) bool { return r == '*' || r == '?' || r == '[' })
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxFileBytes {
		return nil, fmt.Errorf("read configuration: %s is not a regular file of at most %d bytes: %w",
			path, maxFileBytes, errdefs.ErrInvalidArgument)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return data, nil
}

// finish derives what follows from other keys and judges the whole.
func (l *loader) finish() (Config, error) {
	c := &l.config
	if !l.addressed {
		c.Address = socketIn(c.State)
	}
	if c.Runtime.CNI.BinDir != "" {
		_, both := l.where["plugins.io.containerd.cri.v1.runtime.cni.bin_dirs"]
		if both {
			return Config{}, l.fault("plugins.io.containerd.cri.v1.runtime.cni.bin_dir", "bin_dir and bin_dirs are both set; keep bin_dirs")
		}
		c.Runtime.CNI.BinDirs, c.Runtime.CNI.BinDir = []string{c.Runtime.CNI.BinDir}, ""
	}
	if err := l.validate(); err != nil {
		return Config{}, err
	}
	if err := l.applyCgroupDriver(); err != nil {
		return Config{}, err
	}
	return *c, nil
}

// applyCgroupDriver gives every handler of runc's shim the node's driver.
func (l *loader) applyCgroupDriver() error {
	c := &l.config
	if c.Cloister.CgroupDriver == "" {
		return nil
	}
	systemd := c.Cloister.CgroupDriver == "systemd"
	for name, h := range c.Runtime.Containerd.Runtimes {
		if !h.IsRunc() {
			continue
		}
		if set, ok := h.Options["SystemdCgroup"].(bool); ok && set != systemd {
			return l.fault(runtimeKey+"containerd.runtimes."+name+".options.SystemdCgroup",
				fmt.Sprintf("SystemdCgroup is %v, but cgroup_driver of [cloister] is %q; all handlers of a node have one driver", set, c.Cloister.CgroupDriver))
		}
		h.Options = maps.Clone(h.Options)
		if h.Options == nil {
			h.Options = map[string]any{}
		}
		h.Options["SystemdCgroup"] = systemd
		c.Runtime.Containerd.Runtimes[name] = h
	}
	return nil
}

// Validate judges a configuration that was changed after Load.
func (c *Config) Validate() error {
	l := loader{config: *c}
	if err := l.validate(); err != nil {
		return err
	}
	c.LogLevel = l.config.LogLevel
	return nil
}
