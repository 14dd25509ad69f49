package stdio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// MakeFIFO makes a FIFO; one that is there already is kept.
func MakeFIFO(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return nil
}

// OpenFIFO opens a FIFO with exactly the given flags, and refuses anything
// that is none. Without O_NONBLOCK the result is for a child process.
func OpenFIFO(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is not a FIFO", path)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// readerTime is how long a client may take to open its end.
const readerTime = 3 * time.Second

// OpenClientOutput opens a client's FIFO for writing. It waits a moment for
// the client to open its end, and does not wait for ever.
func OpenClientOutput(ctx context.Context, path string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, readerTime)
	defer cancel()
	for {
		f, err := OpenFIFO(path, unix.O_WRONLY|unix.O_NONBLOCK)
		if !errors.Is(err, unix.ENXIO) {
			return f, err
		}
		// There is no event for "a reader has opened".
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("nobody reads %s: %w", path, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// OpenClientInput opens a client's FIFO for reading.
func OpenClientInput(path string) (*os.File, error) {
	return OpenFIFO(path, unix.O_RDONLY|unix.O_NONBLOCK)
}

// ForChild makes a file blocking, as a program expects of its streams.
func ForChild(f *os.File) error {
	return control(f, func(fd int) error { return unix.SetNonblock(fd, false) })
}

// NewPipe makes a nameless pipe with one descriptor for both ends, so that
// one reference keeps it and its content.
func NewPipe() (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	// More slots: each key typed in a terminal may take one.
	_, _ = unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, bigPipe)
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", p[0]), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open both ends of a pipe: %w", err)
	}
	return os.NewFile(uintptr(fd), "pipe"), nil
}
