package container

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Against containers that overwrite the runtime through /proc/PID/exe, crun
// protects itself at each start: it makes a read-only mount of its binary and
// runs itself again from there, which costs 3 ms of 18. A binary that is
// already in a sealed memory file needs none of that, for nobody can write to
// it; so it is put there once, and run from there.

// maxSealed bounds the binaries that are copied. The big ones are written in
// Go and protect themselves without a second start.
const maxSealed = 4 << 20

// sealed is a copy of a runtime's binary in a sealed memory file. The zero
// value is ready.
type sealed struct {
	mu   sync.Mutex // guards the fields; no other process is waited for under it
	of   identity
	file *os.File // nil: of is to be run as it is
}

// identity tells one version of a file from the next.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// path is what to execute instead of the binary: the binary itself where a
// copy brings nothing or cannot be had. release is called after the execution.
func (s *sealed) path(binary string) (path string, release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now, ok := identify(binary); ok && s.of != now {
		s.of, s.file = now, nil
		// SELinux may want the runtime in a domain of its own, which it
		// chooses by the file's label.
		if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil && now.size <= maxSealed {
			s.file, _ = seal(binary) // it is a shortcut only
		}
	}
	if s.file == nil {
		return binary, func() {}
	}
	// Named by the parent: a child moves descriptors about before it executes.
	// An older file is closed once nobody uses it, by the garbage collector.
	file := s.file
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()), func() { runtime.KeepAlive(file) }
}

func identify(binary string) (identity, bool) {
	var st unix.Stat_t
	if unix.Stat(binary, &st) != nil {
		return identity{}, false // the execution says why
	}
	return identity{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}, true //nolint:unconvert // it is narrower on some architectures
}

// seal copies a program into memory so that nobody can change it any more.
func seal(binary string) (sealed *os.File, err error) {
	src, err := os.Open(binary)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	magic := make([]byte, 4)
	if _, err := io.ReadFull(src, magic); err != nil {
		return nil, fmt.Errorf("read %s: %w", binary, err)
	}
	if !bytes.Equal(magic, []byte("\x7fELF")) {
		return nil, fmt.Errorf("%s is a script: %w", binary, unix.ENOEXEC)
	}
	const mfdExec = 0x10 // MFD_EXEC, Linux 6.3; refused before
	fd, err := unix.MemfdCreate("oci-runtime", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|mfdExec)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("oci-runtime", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make a memory file: %w", err)
	}
	w := os.NewFile(uintptr(fd), "oci-runtime")
	defer w.Close()
	if _, err := w.Write(magic); err != nil {
		return nil, err
	}
	if n, err := io.Copy(w, io.LimitReader(src, maxSealed)); err != nil {
		return nil, fmt.Errorf("copy %s: %w", binary, err)
	} else if n == maxSealed {
		return nil, fmt.Errorf("%s grew: %w", binary, unix.EFBIG)
	}
	if _, err := unix.FcntlInt(w.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, fmt.Errorf("seal the copy of %s: %w", binary, err)
	}
	// A file open for writing cannot be executed.
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
}
