package config

import (
	"slices"
	"strings"
)

// migrated is a file in the newest form.
type migrated struct {
	settings []setting
	warnings []Warning
}

// migrate brings the settings of a file into the newest form.
func migrate(settings []setting, version int) migrated {
	m := migrated{}
	all := rules()
	for _, s := range settings {
		s.path = longName(s.path, version)
		m.strayed(&s, version)
		m.apply(s, all, version)
	}
	m.preferNew()
	m.handlers()
	return m
}

// longName gives the plugin of a version 1 file its full name.
func longName(path keyPath, version int) keyPath {
	if version > 1 || len(path) < 2 || path[0] != "plugins" || strings.Contains(path[1], ".") {
		return path
	}
	if id, ok := shortPlugins()[path[1]]; ok {
		return plugin(id, path[2:]...)
	}
	return path
}

// strayed puts keys back into the table of CRI that stand after the header of
// x509_key_pair_streaming: in the reference file that generations of nodes were
// configured by, half of the keys do.
func (m *migrated) strayed(s *setting, version int) {
	inPair := plugin(criPlugin, "x509_key_pair_streaming")
	if version > 2 || len(s.path) != len(inPair)+1 || !s.path[:len(inPair)].equals(inPair...) || isKnown(s.path) {
		return
	}
	meant := plugin(criPlugin, s.path.last())
	if !isKnown(resolve(meant, version)) {
		return
	}
	s.path = meant
	m.warnings = append(m.warnings, Warning{Where: s.place.String(), Key: s.wrote.String(),
		Message: "is taken for " + meant.String() + ": move it before the header of x509_key_pair_streaming, where containerd sees it too"})
}

// apply follows the rules until none is left that changes anything.
func (m *migrated) apply(s setting, all []rule, version int) {
	for range 4 { // a key moves at most so often
		r, to, ok := find(all, s.path, version)
		if !ok {
			break
		}
		if r.why != "" && !isZero(s) {
			m.warn(s, r)
		}
		if to == nil {
			return
		}
		if r.turn != nil && !s.table {
			s.value = r.turn(s.value)
		}
		same := to.equals(s.path...)
		if s.path = to; same {
			break
		}
		s.dropped = s.dropped || r.why != ""
	}
	m.settings = append(m.settings, s)
}

// preferNew takes out what dropped keys say where the file has the key that
// replaces them, too.
func (m *migrated) preferNew() {
	direct := map[string]bool{}
	for _, s := range m.settings {
		if !s.dropped && !s.table {
			direct[s.path.String()] = true
		}
	}
	m.settings = slices.DeleteFunc(m.settings, func(s setting) bool { return s.dropped && direct[s.path.String()] })
}

func find(all []rule, path keyPath, version int) (rule, keyPath, bool) {
	for _, r := range all {
		if to, ok := r.fit(path, version); ok {
			return r, to, true
		}
	}
	return rule{}, nil, false
}

// resolve is where a key of a file goes.
func resolve(path keyPath, version int) keyPath {
	m := migrated{}
	m.apply(setting{path: longName(path, version)}, rules(), version)
	if len(m.settings) == 0 {
		return nil
	}
	return m.settings[0].path
}

// isZero tells of a setting that it says nothing: files that containerd wrote
// name every key.
func isZero(s setting) bool {
	switch v := s.value.(type) {
	case nil:
		return true
	case string:
		return v == ""
	case bool:
		return !v
	case int64:
		return v == 0
	case []any:
		return len(v) == 0
	}
	return false
}

// warn says once for a table, and once for each key outside of one, what
// replaces it.
func (m *migrated) warn(s setting, r rule) {
	key := s.wrote
	if below := len(s.path) - len(r.from); below > 0 && below < len(key) {
		key = key[:len(key)-below] // the rule is for the table
	}
	w := Warning{Where: s.place.String(), Key: key.String(), Deprecated: true}
	w.Message = "is deprecated: " + r.why
	if r.to == nil {
		w.Message = "has no effect: " + r.why
		w.Deprecated = false
	}
	for _, old := range m.warnings {
		if old.Key == w.Key && old.Message == w.Message {
			return
		}
	}
	m.warnings = append(m.warnings, w)
}
