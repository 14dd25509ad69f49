package machine

import (
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for _, c := range []struct {
		what      string
		good      func(string) bool
		yes, no   []string
		atMost    int
		longOfAll string
	}{
		{"id", goodID, []string{"a", "A.b_c-9"}, []string{"", ".a", "a,b", "a\n", "é"}, 128, "a"},
		{"disk", goodDisk, []string{"a-0"}, []string{"", "A", "a.b", "a,b"}, 20, "a"},
		{"parameter", goodParam, []string{"a=b,c", "!~"}, []string{"", "a b", "a\x7f", "é"}, 512, "a"},
		{"MAC", goodMAC, []string{"02:00:00:00:00:0f"}, []string{"", "02:00:00:00:00:0F", "02-00-00-00-00-0f", "02:00:00:00:00", "02:00:00:00:00:00:00:0f", "0200.0000.000f"}, 0, ""},
	} {
		for _, s := range c.yes {
			if !c.good(s) {
				t.Errorf("%s %q is refused", c.what, s)
			}
		}
		for _, s := range c.no {
			if c.good(s) {
				t.Errorf("%s %q is taken", c.what, s)
			}
		}
		if c.atMost > 0 && (!c.good(strings.Repeat(c.longOfAll, c.atMost)) || c.good(strings.Repeat(c.longOfAll, c.atMost+1))) {
			t.Errorf("%s: the limit is not %d", c.what, c.atMost)
		}
	}
	for s, want := range map[string]bool{"a.b-0": true, "": false, "a b": false, "aé": false, "a,b": false, "éa": false} {
		if consists(s, lower+".-", 60) != want {
			t.Errorf("%q: %v", s, !want)
		}
	}
}
