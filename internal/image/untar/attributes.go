package untar

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const paxXattr = "SCHILY.xattr."

// attributes sets owner, extended attributes and mode, in this order: a new
// owner takes set-id bits and file capabilities away.
func (x *extraction) attributes(h *tar.Header, base string) error {
	if !x.at.plain || h.Uid != x.ids[0] || h.Gid != x.ids[1] || h.Typeflag == tar.TypeLink {
		if err := unix.Fchownat(x.at.fd, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set owner %d:%d: %w", h.Uid, h.Gid, err)
		}
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok {
			if err := x.xattr(h, base, name, value); err != nil {
				return err
			}
		}
	}
	return x.mode(h, base)
}

func (x *extraction) mode(h *tar.Header, base string) error {
	mode := unixMode(h.FileInfo().Mode())
	switch h.Typeflag {
	case tar.TypeSymlink:
		return nil
	case tar.TypeReg:
		if x.at.plain && mode&^0o777 == 0 && mode&x.umask == 0 {
			return nil // it was made with this one
		}
	case tar.TypeLink:
		var st unix.Stat_t
		if err := unix.Fstatat(x.at.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("look at the hard link: %w", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return nil
		}
	}
	if err := unix.Fchmodat(x.at.fd, base, mode, 0); err != nil {
		return fmt.Errorf("set mode %o: %w", mode, err)
	}
	return nil
}

func (x *extraction) xattr(h *tar.Header, base, name, value string) error {
	if strings.HasPrefix(name, "trusted.") {
		x.ignore(h, name) // they are overlayfs' own
		return nil
	}
	err := unix.Lsetxattr(x.at.path(base), name, []byte(value), 0)
	if errors.Is(err, unix.ENOTSUP) ||
		errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
		x.ignore(h, name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("set extended attribute %.200q: %w", name, err)
	}
	return nil
}

func (x *extraction) ignore(h *tar.Header, attribute string) {
	if x.Ignored != nil {
		x.Ignored(h.Name, "extended attribute "+attribute)
	}
}

func unixMode(m os.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, is := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if m&is != 0 {
			mode |= bit
		}
	}
	return mode
}

// umask reads the process' without setting it, which others would notice.
func umask() uint32 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32); err == nil {
				return uint32(n)
			}
		}
	}
	return 0o777
}

// dirTime is what a folder's times become when all is in it.
type dirTime struct {
	name  string
	times []unix.Timespec
}

func (x *extraction) dirTimes() error {
	for _, d := range x.dirs {
		fd, err := x.open(d.name, unix.O_RDONLY)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue // a later entry took its place
		}
		if err != nil {
			return fmt.Errorf("open folder %.200q of the layer: %w", d.name, err)
		}
		err = unix.UtimesNanoAt(fd, ".", d.times, unix.AT_SYMLINK_NOFOLLOW)
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("set time of folder %.200q of the layer: %w", d.name, err)
		}
	}
	return nil
}

// times are those of access and change. What no file system keeps is 1970.
func times(h *tar.Header) []unix.Timespec {
	access := h.ModTime
	if h.AccessTime.After(access) {
		access = h.AccessTime
	}
	return []unix.Timespec{timespec(access), timespec(h.ModTime)}
}

func timespec(t time.Time) unix.Timespec {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return unix.Timespec{}
	}
	return unix.NsecToTimespec(t.UnixNano())
}
