package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const stamp = "2026-01-02T03:04:05.000000006Z"

func entry(stream, tag, text string) string {
	return fmt.Sprintf("%s %s %s %s\n", stamp, stream, tag, text)
}

func TestParseLogLine(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	tests := []struct {
		name, in string
		want     logLine
		fails    bool
	}{
		{"full", stamp + " stdout F hello world", logLine{time: at, text: []byte("hello world")}, false},
		{"partial", stamp + " stderr P x", logLine{time: at, stderr: true, partial: true, text: []byte("x")}, false},
		{"more tags", stamp + " stdout P:x:y a", logLine{time: at, partial: true, text: []byte("a")}, false},
		{"empty text", stamp + " stdout F ", logLine{time: at, text: []byte{}}, false},
		{"no text", stamp + " stdout F", logLine{time: at}, false},
		{"blanks stay", stamp + " stdout F   a ", logLine{time: at, text: []byte("  a ")}, false},
		{"other zone", "2026-01-02T04:04:05.000000006+01:00 stdout F a", logLine{time: at, text: []byte("a")}, false},
		{"no time", "yesterday stdout F a", logLine{}, true},
		{"no stream", stamp, logLine{}, true},
		{"odd stream", stamp + " stdlog F a", logLine{}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseLogLine([]byte(tt.in))
			if (err != nil) != tt.fails {
				t.Fatalf("error %v", err)
			}
			if !got.time.Equal(tt.want.time) || got.stderr != tt.want.stderr || got.partial != tt.want.partial || !bytes.Equal(got.text, tt.want.text) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestLogs(t *testing.T) {
	const early = "2020-01-01T00:00:00Z stdout F old\n"
	long := strings.Repeat("x", 200<<10)
	tests := []struct {
		name, file  string
		o           LogOptions
		out, errOut string
	}{
		{"both streams", entry("stdout", "F", "a") + entry("stderr", "F", "b"), LogOptions{Tail: -1}, "a\n", "b\n"},
		{"partial entries join", entry("stdout", "P", "a") + entry("stderr", "F", "b") + entry("stdout", "F", "c"), LogOptions{Tail: -1}, "ac\n", "b\n"},
		{"long", entry("stdout", "F", long), LogOptions{Tail: -1}, long + "\n", ""},
		{"since", early + entry("stdout", "F", "new"), LogOptions{Tail: -1, Since: time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)}, "new\n", ""},
		{"times", entry("stdout", "F", "a"), LogOptions{Tail: -1, Timestamps: true}, stamp + " a\n", ""},
		{"one time for a joined line", entry("stdout", "P", "a") + entry("stdout", "F", "b"), LogOptions{Tail: -1, Timestamps: true}, stamp + " ab\n", ""},
		{"tail", early + entry("stdout", "F", "a") + entry("stdout", "F", "b"), LogOptions{Tail: 2}, "a\nb\n", ""},
		{"tail of nothing", entry("stdout", "F", "a"), LogOptions{Tail: 0}, "", ""},
		{"tail of more than there is", entry("stdout", "F", "a"), LogOptions{Tail: 9}, "a\n", ""},
		{"tail over a long entry", early + entry("stdout", "F", long) + entry("stdout", "F", "b"), LogOptions{Tail: 2}, long + "\nb\n", ""},
		{"unfinished entry", strings.TrimSuffix(entry("stdout", "F", "a"), "\n"), LogOptions{Tail: -1}, "a\n", ""},
		{"not in the format", "panic\n" + entry("stdout", "F", "a"), LogOptions{Tail: -1}, "panic\na\n", ""},
		{"empty", "", LogOptions{Tail: 5}, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "0.log")
			if err := os.WriteFile(path, []byte(tt.file), 0o644); err != nil {
				t.Fatal(err)
			}
			var out, errOut bytes.Buffer
			if err := Logs(t.Context(), path, tt.o, &out, &errOut); err != nil {
				t.Fatal(err)
			}
			if out.String() != tt.out || errOut.String() != tt.errOut {
				t.Errorf("got %.80q and %.80q, want %.80q and %.80q", out.String(), errOut.String(), tt.out, tt.errOut)
			}
		})
	}
}

// signalWriter tells when it has got a text.
type signalWriter struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	wait string
	seen chan struct{}
}

func (w *signalWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf.Write(b)
	if w.wait != "" && strings.Contains(w.buf.String(), w.wait) {
		w.wait = ""
		close(w.seen)
	}
	return len(b), nil
}

func (w *signalWriter) expect(t *testing.T, text string, do func()) {
	t.Helper()
	w.mu.Lock()
	w.wait, w.seen = text, make(chan struct{})
	seen := w.seen
	w.mu.Unlock()
	do()
	select {
	case <-seen:
	case <-time.After(10 * time.Second):
		t.Fatalf("no %q in %q", text, w.buf.String())
	}
}

func TestFollowSurvivesRotation(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	f := create(t, path)
	done := make(chan struct{})
	ended := make(chan error, 1)
	out := &signalWriter{}
	out.expect(t, "one\n", func() {
		fmt.Fprint(f, entry("stdout", "F", "one"))
		go func() { ended <- Logs(t.Context(), path, LogOptions{Follow: true, Done: done, Tail: -1}, out, out) }()
	})
	out.expect(t, "two\n", func() { fmt.Fprint(f, entry("stdout", "F", "two")) })
	// An entry that is written in two pieces is shown once it is whole.
	half := entry("stdout", "F", "three")
	fmt.Fprint(f, half[:40])
	out.expect(t, "three\n", func() { fmt.Fprint(f, half[40:]) })
	if err := os.Rename(path, filepath.Join(dir, "0.log.1")); err != nil {
		t.Fatal(err)
	}
	out.expect(t, "five\n", func() {
		fmt.Fprint(f, entry("stdout", "F", "four"))
		next := create(t, path)
		fmt.Fprint(next, entry("stdout", "F", "five"))
		f = next
	})
	fmt.Fprint(f, entry("stdout", "F", "last"))
	close(done)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if want := "one\ntwo\nthree\nfour\nfive\nlast\n"; out.buf.String() != want {
		t.Errorf("got %q, want %q", out.buf.String(), want)
	}
}

func TestFollowEndsWithContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	create(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	if err := Logs(ctx, path, LogOptions{Follow: true, Tail: -1}, &out, &out); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func FuzzParseLogLine(f *testing.F) {
	f.Add([]byte(stamp + " stdout F hello"))
	f.Add([]byte(stamp + " stderr P:x "))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLogLine(b)
		if err == nil && len(l.text) > 0 && !bytes.HasSuffix(b, l.text) {
			t.Errorf("%q is no part of %q", l.text, b)
		}
	})
}
