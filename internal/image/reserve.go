package image

import (
	"errors"
	"os"
	"syscall"
)

// reserveSize is more than the databases grow by while a failed pull is
// undone and the collector runs.
const reserveSize = 8 << 20

// reserve is a file that only takes space. On a full disk the databases cannot
// be written, and without them nothing can be removed: giving the file up
// makes room to clean up.
type reserve struct{ path string }

func (r reserve) release() { _ = os.Remove(r.path) }

// fill takes the space, where there is plenty.
func (r reserve) fill() {
	if _, err := os.Stat(r.path); err == nil {
		return
	}
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	var st syscall.Statfs_t
	if syscall.Fstatfs(int(f.Fd()), &st) != nil || st.Bavail*uint64(st.Bsize) < 4*reserveSize ||
		syscall.Fallocate(int(f.Fd()), 0, 0, reserveSize) != nil {
		r.release()
	}
}

func isNoSpace(err error) bool {
	return errors.Is(err, errNoSpace) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
