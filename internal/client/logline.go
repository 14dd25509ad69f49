package client

import (
	"bytes"
	"fmt"
	"time"
)

// logLine is one entry of a CRI log file:
//
//	2026-01-02T03:04:05.678901234Z stdout F text
type logLine struct {
	time    time.Time
	stderr  bool
	partial bool // the text goes on in the next entry of the same stream
	text    []byte
}

// parseLogLine reads an entry without its newline. The text is not copied.
func parseLogLine(b []byte) (logLine, error) {
	stamp, rest, ok1 := bytes.Cut(b, []byte{' '})
	stream, rest, ok2 := bytes.Cut(rest, []byte{' '})
	tags, text, ok3 := bytes.Cut(rest, []byte{' '})
	if !ok1 || !ok2 {
		return logLine{}, fmt.Errorf("log entry %.40q is not \"TIME STREAM TAG TEXT\"", b)
	}
	if !ok3 {
		tags, text = rest, nil
	}
	t, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil {
		return logLine{}, fmt.Errorf("log entry %.40q begins with no time", b)
	}
	l := logLine{time: t, text: text}
	switch string(stream) {
	case "stdout":
	case "stderr":
		l.stderr = true
	default:
		return logLine{}, fmt.Errorf("log entry %.40q has the stream %.20q", b, stream)
	}
	// Tags are a list with ":"; the first one alone has a meaning so far.
	first, _, _ := bytes.Cut(tags, []byte{':'})
	l.partial = string(first) == "P"
	return l, nil
}
