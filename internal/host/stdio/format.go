package stdio

import (
	"bytes"
	"time"
)

// headTime is RFC 3339 with all nine digits of the nanoseconds, so that the
// head of an entry has the same width every time.
const headTime = "2006-01-02T15:04:05.000000000Z07:00"

// maxHead is more than the longest head of an entry:
// time, zone, "stdout", "F", three spaces.
const maxHead = 64

// how much of the text Format may use.
type ending int

const (
	more   ending = iota // an unfinished last line may stay
	forced               // at least something must be used: the pipe is full
	last                 // nothing follows: all must be used
)

// Format appends log entries for text to out and tells how many bytes of text
// they cover. A line longer than max bytes is cut into partial entries; with
// max <= 0 no line is. It stops when out has room for no further entry.
func Format(out []byte, text []byte, stream string, at time.Time, max int, end ending) ([]byte, int) {
	var head [maxHead]byte
	h := at.AppendFormat(head[:0], headTime)
	h = append(h, ' ')
	h = append(h, stream...)
	used := 0
	entry := func(tag byte, line []byte) bool {
		if len(out)+len(h)+4+len(line) > cap(out) && used > 0 {
			return false
		}
		out = append(out, h...)
		out = append(out, ' ', tag, ' ')
		out = append(out, line...)
		out = append(out, '\n')
		return true
	}
	for used < len(text) {
		rest := text[used:]
		n := bytes.IndexByte(rest, '\n')
		length := n
		if n < 0 {
			length = len(rest)
		}
		switch {
		case max > 0 && length > max:
			if !entry('P', rest[:max]) {
				return out, used
			}
			used += max
		case n >= 0:
			if !entry('F', rest[:n]) {
				return out, used
			}
			used += n + 1
		case end == last || end == forced && used == 0:
			if entry('P', rest) {
				used = len(text)
			}
			return out, used
		default:
			return out, used
		}
	}
	return out, used
}
