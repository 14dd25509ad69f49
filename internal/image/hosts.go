package image

// Hosts is what of Options may change while the store is open: how registries
// are reached. A pull goes on with what it began with.
type Hosts struct {
	ConfigPath string
	Headers    map[string][]string
}

// SetHosts replaces what Options said of registries. With an error nothing
// changes.
func (s *Store) SetHosts(h Hosts) error {
	if h.ConfigPath == "" {
		h.ConfigPath = defaultHostsPath
	}
	s.hosts.Store(&h)
	return nil
}
