package stdio

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type rig struct {
	t      *testing.T
	dir    string
	path   string
	log    *Log
	writer *os.File
	stream *Stream
	fan    Fanout
}

func newRig(t *testing.T, dir string, maxLine int) *rig {
	t.Helper()
	r := &rig{t: t, dir: dir, path: filepath.Join(dir, "log")}
	if err := MakeFIFO(filepath.Join(dir, "fifo")); err != nil {
		t.Fatal(err)
	}
	r.open(maxLine)
	return r
}

// open does what a shim does at its start.
func (r *rig) open(maxLine int) {
	r.t.Helper()
	var err error
	if r.log, err = OpenLog(r.path, filepath.Join(r.dir, "mark"), maxLine); err != nil {
		r.t.Fatal(err)
	}
	read, err := OpenFIFO(filepath.Join(r.dir, "fifo"), unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.writer == nil {
		if r.writer, err = OpenFIFO(filepath.Join(r.dir, "fifo"), unix.O_RDWR); err != nil {
			r.t.Fatal(err)
		}
	}
	r.stream = &Stream{Name: "stdout", Pipe: read, Log: r.log, Out: &r.fan, Buffers: &Buffers{}, Slog: slog.New(slog.DiscardHandler)}
}

func (r *rig) write(s string) {
	r.t.Helper()
	if _, err := r.writer.WriteString(s); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) flush() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.stream.flush(ctx, more); err != nil {
		r.t.Fatal(err)
	}
}

// text is the log without the heads.
func (r *rig) text() string {
	r.t.Helper()
	b, err := os.ReadFile(r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	var s strings.Builder
	for line := range bytes.Lines(b) {
		f := bytes.SplitN(line, []byte(" "), 3)
		s.Write(f[2])
	}
	return s.String()
}

func (r *rig) want(want string) {
	r.t.Helper()
	if got := r.text(); got != want {
		r.t.Errorf("log %.200q, want %.200q", got, want)
	}
}

func TestStream(t *testing.T) {
	r := newRig(t, t.TempDir(), 16)
	r.stream.Start()
	r.write("one\ntw")
	r.flush()
	r.want("F one\n")
	r.write("o\n")
	r.flush()
	r.want("F one\nF two\n")
	r.write(strings.Repeat("x", 20))
	r.flush()
	r.write("\nlast")
	r.writer.Close()
	select {
	case <-r.stream.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the stream does not end")
	}
	r.want("F one\nF two\nP xxxxxxxxxxxxxxxx\nF xxxx\nP last\n")
}

func TestStopKeepsTheRest(t *testing.T) {
	r := newRig(t, t.TempDir(), 16)
	r.write("a\nrest") // before the start, by a container that was faster
	r.stream.Start()
	r.stream.Stop()
	r.want("F a\nP rest\n")
}

// TestFullPipe: a line without an end in tiny pieces must not stop the writer.
func TestFullPipe(t *testing.T) {
	r := newRig(t, t.TempDir(), 0)
	r.stream.Start()
	line := strings.Repeat("0123456789", 30000)
	r.write(line + "\n")
	r.flush()
	r.want("F " + line + "\n") // never split as long as it fits into a pipe
	huge := strings.Repeat("y", 3<<20)
	r.write(huge)
	r.stream.Stop()
	got := strings.NewReplacer("P ", "", "\n", "").Replace(strings.TrimPrefix(r.text(), "F "+line))
	if got != huge {
		t.Errorf("%d of %d bytes", len(got), len(huge))
	}
}

// TestKilled leaves the files as a process does that was killed at each point
// of a move, and takes them up again.
func TestKilled(t *testing.T) {
	const text = "line 1\nline 2\n"
	for name, move := range map[string]func(l *Log, entries, text []byte, pipe int){
		"before the note": func(*Log, []byte, []byte, int) {},
		"noted":           func(l *Log, _, text []byte, _ int) { note1(l, text) },
		"written": func(l *Log, entries, text []byte, _ int) {
			note1(l, text)
			_, _ = l.file.Write(entries)
		},
		"half written, as by a crash of the machine": func(l *Log, entries, text []byte, _ int) {
			note1(l, text)
			_, _ = l.file.Write(entries[:len(entries)/2])
		},
		"drained": func(l *Log, entries, text []byte, pipe int) {
			note1(l, text)
			_, _ = l.file.Write(entries)
			drain(pipe, text[:len(text)-1], l.mark.witness())
		},
		"done": func(l *Log, entries, text []byte, pipe int) { _ = l.move(entries, text, pipe) },
	} {
		for _, rotated := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s rotated %v", name, rotated), func(t *testing.T) {
				r := newRig(t, t.TempDir(), 100)
				if err := os.WriteFile(r.path, []byte("T stdout F older\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				r.write(text)
				entries, used := Format(make([]byte, 0, 1000), []byte(text), "stdout", time.Now(), 100, more)
				if err := control(r.stream.Pipe, func(pipe int) error {
					move(r.log, entries, []byte(text)[:used], pipe)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				old := r.path + ".1"
				if rotated {
					if err := os.Rename(r.path, old); err != nil {
						t.Fatal(err)
					}
				}
				r.open(100) // the old process's files are simply left
				r.stream.Start()
				r.write("line 3\n")
				r.stream.Stop()
				got := r.text()
				if rotated {
					r.path = old
					got = r.text() + got
				}
				if want := "F older\nF line 1\nF line 2\nF line 3\n"; got != want {
					t.Errorf("log %q, want %q", got, want)
				}
			})
		}
	}
}

func note1(l *Log, text []byte) {
	var st unix.Stat_t
	_ = fstat(l.file, &st)
	l.mark.set(st.Ino, st.Size, len(text), text[len(text)-1])
}

// TestFullDisk: the container waits, nothing is lost, nothing spins.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	r := newRig(t, t.TempDir(), 100)
	r.log.Close()
	r.path = filepath.Join(disk, "log")
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 40<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	r.open(100)
	failed := make(firstError, 1)
	r.stream.Slog = slog.New(failed)
	r.stream.Start()
	var want strings.Builder
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range 300 {
			fmt.Fprintf(r.writer, "line %d\n", i)
		}
	}()
	for i := range 300 {
		fmt.Fprintf(&want, "F line %d\n", i)
	}
	<-written // fits into the pipe
	more := strings.Repeat("z", 90)
	go func() {
		for range 300 {
			fmt.Fprintln(r.writer, more)
		}
	}()
	for range 300 {
		want.WriteString("F " + more + "\n")
	}
	select {
	case <-failed:
	case <-time.After(10 * time.Second):
		t.Fatal("the disk does not get full")
	}
	time.Sleep(200 * time.Millisecond) // some failing attempts
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); strings.Count(r.text(), "\n") < 600 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	r.stream.Stop()
	r.want(want.String())
}

// The last line of a container that ended is flushed although it is not
// finished and somebody still holds the pipe open.
func TestFlushUnfinishedLine(t *testing.T) {
	r := newRig(t, t.TempDir(), 100)
	r.stream.Start()
	r.write("whole\nhalf")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := r.stream.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	r.want("F whole\nP half\n")
}

// A container's end is not kept back by a log that cannot be written, and what
// it wrote last is there when there is room again soon.
func TestFlushOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	r := newRig(t, t.TempDir(), 100)
	r.log.Close()
	r.path = filepath.Join(disk, "log")
	filler := filepath.Join(disk, "filler")
	r.open(100)
	r.stream.Start()
	if err := os.WriteFile(filler, make([]byte, 128<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk does not get full: %v", err)
	}
	r.write("last words\n")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	began := time.Now()
	if err := r.stream.flush(ctx, more); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	r.flush()
	r.stream.Stop()
	r.want("F last words\n")
}

// firstError is a log handler that tells of an error.
type firstError chan struct{}

func (firstError) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }
func (c firstError) Handle(context.Context, slog.Record) error {
	select {
	case c <- struct{}{}:
	default:
	}
	return nil
}
func (c firstError) WithAttrs([]slog.Attr) slog.Handler { return c }
func (c firstError) WithGroup(string) slog.Handler      { return c }

func TestFanoutCutsOffSlowClients(t *testing.T) {
	p := filepath.Join(t.TempDir(), "client")
	if err := MakeFIFO(p); err != nil {
		t.Fatal(err)
	}
	in, err := OpenClientInput(p)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := OpenClientOutput(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	var f Fanout
	if err := f.Add("stdout", out); err != nil {
		t.Fatal(err)
	}
	f.Write("stderr", []byte("not for this one"))
	block := bytes.Repeat([]byte("b"), 64<<10)
	for range 40 {
		f.Write("stdout", block)
	}
	total := 0
	buf := make([]byte, 64<<10)
	if err := in.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for {
		n, err := in.Read(buf)
		total += n
		if err != nil {
			break
		}
	}
	if total < len(block) || total > maxBacklog+2*len(block) {
		t.Errorf("the client got %d bytes", total)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.sinks) != 0 {
		t.Error("the client is still there")
	}
}

// TestBigWriteBehindUnfinishedLine: one write that is larger than the pipe must
// not wait for ever behind a line that is not finished, or behind one of its
// own.
func TestBigWriteBehindUnfinishedLine(t *testing.T) {
	for _, before := range []string{"", "unfinished"} {
		for _, size := range []int{200 << 10, 64<<20 + 17} {
			t.Run(fmt.Sprintf("%q %d", before, size), func(t *testing.T) {
				r := newRig(t, t.TempDir(), 16<<10)
				r.stream.Start()
				defer r.stream.Stop()
				if before != "" {
					r.write(before)
					r.flush()
				}
				fd, err := unix.Open(filepath.Join(r.dir, "fifo"), unix.O_WRONLY, 0) // blocking, as a container's is
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(fd)
				wrote := make(chan error, 1)
				text := bytes.Repeat([]byte("x"), size)
				text[size-1] = '\n'
				go func() {
					n, err := unix.Write(fd, text)
					if err == nil && n != size {
						err = fmt.Errorf("%d of %d bytes", n, size)
					}
					wrote <- err
				}()
				select {
				case err := <-wrote:
					if err != nil {
						t.Fatal(err)
					}
				case <-time.After(40 * time.Second): // at a glance a second it would take minutes
					t.Fatal("the writer waits for the reader, and the reader for the writer")
				}
				r.flush()
				if got := strings.Count(r.text(), "x"); got != size-1 {
					t.Errorf("%d of %d bytes are in the log", got, size-1)
				}
			})
		}
	}
}
