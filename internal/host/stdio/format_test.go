package stdio

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)

const testHead = "2026-01-02T03:04:05.000006000Z stdout "

func TestFormat(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		max  int
		end  ending
		want string // heads left out
		used int
	}{
		"whole lines":          {"a\nb\n", 8, more, "F a\nF b\n", 4},
		"unfinished stays":     {"a\nb", 8, more, "F a\n", 2},
		"nothing yet":          {"abc", 8, more, "", 0},
		"empty lines":          {"\n\n", 8, more, "F \nF \n", 2},
		"exactly the limit":    {"12345678\n", 8, more, "F 12345678\n", 9},
		"limit, unfinished":    {"12345678", 8, more, "", 0},
		"split":                {"123456789\n", 8, more, "P 12345678\nF 9\n", 10},
		"split twice":          {"1234567812345678x\n", 8, more, "P 12345678\nP 12345678\nF x\n", 18},
		"split, unfinished":    {"123456789", 8, more, "P 12345678\n", 8},
		"full pipe":            {"abc", 8, forced, "P abc\n", 3},
		"full pipe with lines": {"a\nbc", 8, forced, "F a\n", 2},
		"end":                  {"a\nbc", 8, last, "F a\nP bc\n", 4},
		"never split":          {"123456789abc\n", 0, more, "F 123456789abc\n", 13},
		"never split, end":     {"123456789abc", -1, last, "P 123456789abc\n", 12},
		"bytes as they are":    {"\x00\x1b[0m\xff\n", 8, more, "F \x00\x1b[0m\xff\n", 7},
	} {
		got, used := Format(make([]byte, 0, 4096), []byte(c.text), "stdout", testTime, c.max, c.end)
		if s := strings.ReplaceAll(string(got), testHead, ""); s != c.want || used != c.used {
			t.Errorf("%s: %q, %d used; want %q, %d", name, s, used, c.want, c.used)
		}
	}
}

// FuzzFormat checks that what was used can be put together again from the
// entries, whatever the text and the room.
func FuzzFormat(f *testing.F) {
	f.Add([]byte("a\nbb\nccc"), 2, 100, 0)
	f.Add([]byte("\n\n\x00"), 0, 64, 2)
	f.Add(bytes.Repeat([]byte("x"), 300), 16, 200, 1)
	f.Fuzz(func(t *testing.T, text []byte, max, room, end int) {
		if room < 0 || room > 1<<16 || end < 0 || end > 2 || max > 1<<20 {
			t.Skip("sizes that the formatter is never called with")
		}
		out, used := Format(make([]byte, 0, room), text, "stdout", testTime, max, ending(end))
		if used < 0 || used > len(text) || len(text) > 0 && used == 0 && ending(end) != more {
			t.Fatalf("used %d of %d", used, len(text))
		}
		var again []byte
		for len(out) > 0 {
			entry, rest, ok := bytes.Cut(out, []byte("\n"))
			body, isEntry := bytes.CutPrefix(entry, []byte(testHead))
			if !ok || !isEntry || len(body) < 2 || body[1] != ' ' {
				t.Fatalf("torn entry %q", entry)
			}
			if max > 0 && len(body)-2 > max {
				t.Fatalf("entry of %d bytes", len(body)-2)
			}
			again = append(again, body[2:]...)
			switch body[0] {
			case 'F':
				again = append(again, '\n')
			case 'P':
			default:
				t.Fatalf("tag %q", body[0])
			}
			out = rest
		}
		if !bytes.Equal(again, text[:used]) {
			t.Fatalf("%q became %q", text[:used], again)
		}
	})
}
