package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"
)

// maxFileBytes bounds one file, see maxSettings.
const maxFileBytes = 1 << 20

// Load reads the file at path with its drop-ins. The empty path means
// DefaultPath with conf.d beside it, and that neither has to exist.
func Load(path string) (Config, error) {
	l := newLoader()
	if err := l.load(path); err != nil {
		return Config{}, err
	}
	return l.finish()
}

// loader gathers the files of one configuration.
type loader struct {
	config   Config
	origins  map[string]origin // keyPath → where it was set last
	settings []setting         // of all files, in the newest form
	warnings []Warning
}

func newLoader() *loader { return &loader{config: Default(), origins: map[string]origin{}} }

func (l *loader) load(path string) error {
	if path != "" {
		return l.loadFiles(pending{path: path, must: true})
	}
	return l.loadDefault(DefaultPath)
}

func (l *loader) loadDefault(path string) error {
	return l.loadFiles(pending{path: path}, pending{path: filepath.Join(filepath.Dir(path), "conf.d", "*.toml")})
}

// pending is a file, or a pattern of files, that is to be read.
type pending struct {
	path    string
	must    bool // it has to be there
	from    string
	version int // of the file that names it
}

// loadFiles reads files and then what they import: an import overrides the
// file that names it. A file that was read already is not read again.
func (l *loader) loadFiles(queue ...pending) error {
	var faults []error
	for ; len(queue) > 0; queue = queue[1:] {
		p := queue[0]
		files := []string{p.path}
		for _, dir := range foldersOf(files) {
			if !slices.Contains(l.config.Folders, dir) {
				l.config.Folders = append(l.config.Folders, dir)
			}
		}
		if hasWildcard(p.path) {
			var err error
			if files, err = filepath.Glob(p.path); err != nil {
				return fmt.Errorf("%s: imports: pattern %q: %w: %w", p.from, p.path, err, errdefs.ErrInvalidArgument)
			}
		}
		for _, file := range files {
			more, err := l.loadFile(file, p)
			faults = append(faults, err)
			queue = append(queue, more...)
		}
	}
	return errors.Join(faults...)
}

func (l *loader) loadFile(path string, p pending) ([]pending, error) {
	path = filepath.Clean(path)
	if slices.Contains(l.config.Files, path) {
		return nil, nil
	}
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) && !p.must {
		return nil, nil
	}
	if err != nil && p.from != "" {
		return nil, fmt.Errorf("%s: imports: %w", p.from, err)
	}
	if err != nil {
		return nil, err
	}
	l.config.Files = append(l.config.Files, path)
	before := len(l.settings)
	version, imports, err := l.decode(path, data, p.version)
	l.warnMode(path, l.settings[before:])
	var more []pending
	for _, pattern := range imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(path), pattern)
		}
		more = append(more, pending{path: pattern, must: !hasWildcard(pattern), from: path, version: version})
	}
	return more, err
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

// warnMode warns of a file that the wrong people can write, or read where it
// holds a secret.
func (l *loader) warnMode(path string, settings []setting) {
	info, err := os.Stat(path)
	if err != nil {
		return // it was read just now
	}
	if info.Mode().Perm()&0o002 != 0 {
		l.warnings = append(l.warnings, Warning{Where: path + ":1", Key: filepath.Base(path),
			Message: fmt.Sprintf("can be written by others (mode %o), who have all rights on this machine through it: chmod o-w", info.Mode().Perm())})
	}
	for _, s := range settings {
		t, _, ok := lookup(s.path)
		if ok && t == reflect.TypeFor[Secret]() && !isZero(s) && info.Mode().Perm()&0o044 != 0 {
			l.warnings = append(l.warnings, Warning{Where: s.place.String(), Key: s.wrote.String(),
				Message: fmt.Sprintf("is a secret in a file that others can read (mode %o): chmod 600", info.Mode().Perm())})
		}
	}
}

// finish derives what follows from other keys and judges the whole.
func (l *loader) finish() (Config, error) {
	c := &l.config
	if c.Address = c.Plugins.GRPC.Address; c.Address == "" {
		c.Address = socketIn(c.State)
	}
	l.derive()
	if err := l.validate(); err != nil {
		return Config{}, err
	}
	if err := l.applyCgroupDriver(); err != nil {
		return Config{}, err
	}
	l.warnIdle()
	c.Warnings = l.warnings
	return *c, nil
}

// derive gives empty values and values in two tables their meaning.
func (l *loader) derive() {
	c, d := &l.config, Default()
	if c.Runtime.StatsCollectPeriod.Duration == 0 {
		c.Runtime.StatsCollectPeriod = d.Runtime.StatsCollectPeriod
	}
	if c.Runtime.StatsRetentionPeriod.Duration == 0 {
		c.Runtime.StatsRetentionPeriod = d.Runtime.StatsRetentionPeriod
	}
	if c.LogFormat == "" {
		c.LogFormat = d.LogFormat
	}
	if r := &c.Images.Registry; r.ConfigPath == "" && len(r.Mirrors) == 0 {
		r.ConfigPath = d.Images.Registry.ConfigPath
	} else if len(r.Mirrors) > 0 && !l.isSet(plugin(imagesPlugin, "registry", "config_path")) {
		r.ConfigPath = "" // the default trees are for nodes without mirrors of the old form
	}
	if h, ok := c.Runtime.Containerd.Runtimes["runc"]; ok && h.RuntimeType == "" && h.RuntimePath == "" {
		h.RuntimeType = RuncType // as the handler of this name has in containerd without being told
		c.Runtime.Containerd.Runtimes["runc"] = h
	}
	transfer := plugin("io.containerd.transfer.v1.local")
	images := plugin(imagesPlugin)
	if l.isSet(transfer.and("max_concurrent_downloads")) && !l.isSet(images.and("max_concurrent_downloads")) {
		c.Images.MaxConcurrentDownloads = c.Plugins.Transfer.MaxConcurrentDownloads
	}
	if l.isSet(transfer.and("concurrent_layer_fetch_buffer")) && !l.isSet(images.and("concurrent_layer_fetch_buffer")) {
		c.Images.ConcurrentLayerFetchBuffer = c.Plugins.Transfer.ConcurrentLayerFetchBuffer
	}
	if c.Plugins.Transfer.ConfigPath != "" && !l.isSet(images.and("registry", "config_path")) {
		c.Images.Registry.ConfigPath = c.Plugins.Transfer.ConfigPath
	}
}

// isSet tells whether a file gives the key a value that says something.
func (l *loader) isSet(path keyPath) bool {
	return slices.ContainsFunc(l.settings, func(s setting) bool { return s.path.equals(path...) && !isZero(s) })
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
			return l.fault(plugin(runtimePlugin, "containerd", "runtimes", name, "options", "SystemdCgroup"),
				"SystemdCgroup is %v, but cgroup_driver of [cloister] is %q; all handlers of a node have one driver", set, c.Cloister.CgroupDriver)
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
