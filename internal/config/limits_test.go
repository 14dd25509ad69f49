package config

import (
	"slices"
	"strings"
	"testing"
)

func TestRlimits(t *testing.T) {
	got, err := HandlerLimits{Ulimits: map[string]string{"nofile": "1024:4096", "core": "0", "memlock": "1:unlimited"}}.Rlimits()
	want := []Rlimit{{"RLIMIT_CORE", 0, 0}, {"RLIMIT_MEMLOCK", 1, unlimited}, {"RLIMIT_NOFILE", 1024, 4096}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("limits %v, %v; want %v", got, err, want)
	}
	for _, c := range [][3]string{
		{"files", "1", "nofile"},
		{"nofile", "2:1", "soft"},
		{"nofile", "", "SOFT:HARD"},
		{"nofile", "-1", "SOFT:HARD"},
		{"nofile", "1:2:3", "SOFT:HARD"},
		{"nofile", "99999999999999999999", "SOFT:HARD"},
	} {
		if _, err := (HandlerLimits{Ulimits: map[string]string{c[0]: c[1]}}).Rlimits(); err == nil || !strings.Contains(err.Error(), c[2]) {
			t.Errorf("%s = %q: %v, want an error with %q", c[0], c[1], err, c[2])
		}
	}
}
