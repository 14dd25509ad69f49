package config

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// HandlerLimits is one table of Cloister.Handlers.
type HandlerLimits struct {
	// Ulimits of the handler's containers by name, as in nofile = "1024:4096":
	// soft and hard limit, or one number for both, or "unlimited".
	Ulimits map[string]string `toml:"ulimits"`
}

// Rlimit is one of HandlerLimits.Ulimits.
type Rlimit struct {
	Type       string // RLIMIT_NOFILE and its like
	Soft, Hard uint64
}

const unlimited = ^uint64(0)

// Rlimits reads the limits, in the order of their names.
func (h HandlerLimits) Rlimits() ([]Rlimit, error) {
	known := []string{"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}
	var all []Rlimit
	for _, name := range slices.Sorted(maps.Keys(h.Ulimits)) {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%s is no limit of a process; known are %s", name, strings.Join(known, ", "))
		}
		text := h.Ulimits[name]
		low, high, both := strings.Cut(text, ":")
		if !both {
			high = low
		}
		l := Rlimit{Type: "RLIMIT_" + strings.ToUpper(name)}
		var err, err2 error
		l.Soft, err = limit(low)
		l.Hard, err2 = limit(high)
		if err != nil || err2 != nil {
			return nil, fmt.Errorf(`%s is %q; write "SOFT:HARD", numbers or "unlimited"`, name, text)
		}
		if l.Soft > l.Hard {
			return nil, fmt.Errorf("%s is %q; the soft limit may not be above the hard one", name, text)
		}
		all = append(all, l)
	}
	return all, nil
}

func limit(s string) (uint64, error) {
	if s == "unlimited" {
		return unlimited, nil
	}
	return strconv.ParseUint(s, 10, 63)
}
