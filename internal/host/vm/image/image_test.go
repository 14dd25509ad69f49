package image

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestFindModule(t *testing.T) {
	c := Contents{Modules: map[string]Module{
		"ip_tables": {Path: "/m/ip_tables.ko", Needs: []string{"x_tables"}, Aliases: []string{"ipt_icmp"}},
		"x_tables":  {Path: "/m/x_tables.ko"},
	}}
	for name, want := range map[string][]string{
		"ip-tables": {"/m/x_tables.ko", "/m/ip_tables.ko"}, "ipt_icmp": {"/m/x_tables.ko", "/m/ip_tables.ko"},
		"x_tables": {"/m/x_tables.ko"}, "floppy": nil, "": nil,
	} {
		if got := c.Find(name); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestAbsent(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir, "absent"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "cloister guest build") {
		t.Errorf("an absent guest: %v", err)
	}
	if all, err := List("/nowhere/at/all"); err != nil || all == nil || len(all) != 0 {
		t.Errorf("no folder of guests: %v %v", all, err)
	}
}
