package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// LogOptions choose what Logs shows.
type LogOptions struct {
	// Follow goes on until Done is closed and everything was read.
	Follow bool
	Done   <-chan struct{}
	// Tail shows so many of the last entries; negative shows all.
	Tail int
	// Since leaves out what is older.
	Since time.Time
	// Timestamps puts the time of each entry before its text.
	Timestamps bool
}

// maxLogLine bounds one entry; shims split at 16 KiB unless told otherwise.
const maxLogLine = 64 << 20

// Logs copies a container's log file to the two streams. A file that was
// renamed for rotation is read to its end before the new one is begun.
func Logs(ctx context.Context, path string, o LogOptions, stdout, stderr io.Writer) error {
	var changes <-chan fsnotify.Event
	if o.Follow {
		w, err := fsnotify.NewWatcher()
		if err != nil {
			return fmt.Errorf("follow log: %w", err)
		}
		defer w.Close()
		if err := w.Add(filepath.Dir(path)); err != nil {
			return fmt.Errorf("follow log %s: %w", path, err)
		}
		changes = w.Events
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer func() { f.Close() }()
	if err := seekTail(f, o.Tail); err != nil {
		return fmt.Errorf("read log %s: %w", path, err)
	}
	out := &logWriter{o: o, stdout: stdout, stderr: stderr}
	ended := false
	for {
		if err := out.copy(f); err != nil {
			return fmt.Errorf("read log %s: %w", path, err)
		}
		next, err := successor(f, path)
		if err != nil {
			return err
		}
		if next != nil {
			// What was written between the last read and the rename.
			err := out.copy(f)
			f.Close()
			if f = next; err != nil {
				return fmt.Errorf("read log %s: %w", path, err)
			}
			continue
		}
		if !o.Follow || ended {
			return out.flush()
		}
		select {
		case <-changes:
		case <-o.Done:
			ended = true
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// successor opens the file that took the path from f, if there is one.
func successor(f *os.File, path string) (*os.File, error) {
	mine, err := f.Stat()
	if err != nil {
		return nil, err
	}
	next, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // renamed, and the new one is not made yet
	}
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	theirs, err := next.Stat()
	if err != nil || os.SameFile(mine, theirs) {
		return nil, errors.Join(err, next.Close())
	}
	return next, nil
}

// logWriter turns entries into output. An entry that the shim is still
// writing waits in rest.
type logWriter struct {
	o              LogOptions
	stdout, stderr io.Writer
	rest           []byte
	open           [2]bool // a stream whose last entry was partial
}

func (w *logWriter) copy(r io.Reader) error {
	in := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(w.rest), r), 64<<10)
	w.rest = nil
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			w.rest = line
			return nil
		}
		if err != nil {
			return err
		}
		if len(line) > maxLogLine {
			return fmt.Errorf("an entry is longer than %d bytes", maxLogLine)
		}
		if err := w.entry(line[:len(line)-1]); err != nil {
			return err
		}
	}
}

// entry writes one entry; what is not in the format is shown as it stands.
func (w *logWriter) entry(b []byte) error {
	l, err := parseLogLine(b)
	if err != nil {
		_, err := fmt.Fprintf(w.stdout, "%s\n", b)
		return err
	}
	if l.time.Before(w.o.Since) {
		return nil
	}
	out, i := w.stdout, 0
	if l.stderr {
		out, i = w.stderr, 1
	}
	var buf []byte
	if w.o.Timestamps && !w.open[i] {
		buf = append(l.time.AppendFormat(buf, time.RFC3339Nano), ' ')
	}
	buf = append(buf, l.text...)
	if !l.partial {
		buf = append(buf, '\n')
	}
	w.open[i] = l.partial
	_, err = out.Write(buf)
	return err
}

// flush shows an entry that was never finished.
func (w *logWriter) flush() error {
	if len(w.rest) == 0 {
		return nil
	}
	b := w.rest
	w.rest = nil
	return w.entry(b)
}

// seekTail puts the file before its last n entries.
func seekTail(f *os.File, n int) error {
	if n < 0 {
		return nil
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = int64(64 << 10)
	buf := make([]byte, block)
	newlines := 0
	for pos := end; pos > 0; {
		size := min(block, pos)
		pos -= size
		if _, err := f.ReadAt(buf[:size], pos); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			// The newline at the very end closes the last entry.
			if buf[i] != '\n' || pos+i == end-1 {
				continue
			}
			if newlines++; newlines == n {
				_, err = f.Seek(pos+i+1, io.SeekStart)
				return err
			}
		}
	}
	if n == 0 {
		return nil
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}
