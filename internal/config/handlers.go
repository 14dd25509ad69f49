package config

import (
	"slices"
)

// The shims of containerd 1.0 and 1.3, which runc.v2 replaced.
const (
	linuxType  = "io.containerd.runtime.v1.linux"
	runcV1Type = "io.containerd.runc.v1"
)

// handlers brings the handlers of old files to runc.v2, where keys that stood
// beside them are options.
func (m *migrated) handlers() {
	systemd, noPivot := m.take(systemdKey), m.take(noPivotKey)
	linux := false
	for _, name := range m.handlerNames() {
		at := plugin(runtimePlugin, "containerd", "runtimes", name)
		engine, state := m.take(at.and(engineKey)...), m.take(at.and(stateKey)...)
		kind := m.get(at.and("runtime_type"))
		if kind == nil || kind.value == "" {
			m.dropUnset(at)
			continue
		}
		switch kind.value {
		case linuxType:
			linux = true
			m.replaceType(kind)
			m.option(at, "BinaryName", engine)
			m.option(at, "Root", state)
			m.option(at, "SystemdCgroup", systemd)
			m.option(at, "NoPivotRoot", noPivot)
		case runcV1Type:
			m.replaceType(kind)
			m.useless(engine)
			m.useless(state)
		default:
			m.useless(engine)
			m.useless(state)
		}
	}
	m.defaultHandler()
	if !linux {
		m.useless(noPivot)
		if systemd != nil && systemd.value == true {
			systemd.path, systemd.value = keyPath{"cloister", "cgroup_driver"}, "systemd"
			m.settings = append(m.settings, *systemd)
		}
	}
}

// get finds the setting that counts.
func (m *migrated) get(path keyPath) *setting {
	for i := len(m.settings) - 1; i >= 0; i-- {
		if s := &m.settings[i]; !s.table && s.path.equals(path...) {
			return s
		}
	}
	return nil
}

// take finds a setting and takes it out.
func (m *migrated) take(path ...string) *setting {
	s := m.get(path)
	if s == nil {
		return nil
	}
	found := *s
	m.settings = slices.DeleteFunc(m.settings, func(s setting) bool { return s.path.equals(path...) })
	return &found
}

func (m *migrated) handlerNames() []string {
	var names []string
	for _, s := range m.settings {
		if len(s.path) > 4 && s.path[1] == runtimePlugin && s.path[2] == "containerd" && s.path[3] == "runtimes" && !slices.Contains(names, s.path[4]) {
			names = append(names, s.path[4])
		}
	}
	return names
}

// dropUnset takes out a default_runtime or untrusted_workload_runtime without
// a type: that is how containerd writes that there is none.
func (m *migrated) dropUnset(at keyPath) {
	m.settings = slices.DeleteFunc(m.settings, func(s setting) bool {
		return len(s.path) >= len(at) && s.path[:len(at)].equals(at...) &&
			(slices.Contains(s.wrote, "default_runtime") || slices.Contains(s.wrote, "untrusted_workload_runtime"))
	})
}

func (m *migrated) replaceType(s *setting) {
	m.warnings = append(m.warnings, Warning{Where: s.place.String(), Key: s.wrote.String(), Deprecated: true,
		Message: "is " + s.value.(string) + ", which is gone: " + RuncType + " serves it"})
	s.value = RuncType
}

// option makes an option of a key that stood outside of the options, unless
// the option is there.
func (m *migrated) option(at keyPath, name string, s *setting) {
	path := at.and("options", name)
	if s == nil || isZero(*s) || m.get(path) != nil {
		return
	}
	s.path = path
	m.settings = append(m.settings, *s)
}

// useless turns the advice about a key that acted on old shims alone into the
// plain fact.
func (m *migrated) useless(s *setting) {
	if s == nil || isZero(*s) {
		return
	}
	key := s.wrote.String()
	for i := range m.warnings {
		if m.warnings[i].Key == key {
			m.warnings[i].Message = "has no effect on this runtime_type: it was for " + linuxType + " alone"
			m.warnings[i].Deprecated = false
		}
	}
}

// defaultHandler lets the former table default_runtime be what it was.
func (m *migrated) defaultHandler() {
	s := m.get(plugin(runtimePlugin, "containerd", "runtimes", "default", "runtime_type"))
	if s == nil || !slices.Contains(s.wrote, "default_runtime") {
		return
	}
	name := *s
	name.path, name.value = plugin(runtimePlugin, "containerd", "default_runtime_name"), "default"
	m.take(name.path...)
	m.settings = append(m.settings, name)
}
