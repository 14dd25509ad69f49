// Package untar writes the archive of an image's layer into an empty folder
// that becomes a layer of overlayfs.
//
// The archive is hostile. Whatever it holds, nothing outside of the folder is
// read, made, changed or removed: folders are opened by openat2 with the folder
// as their root, and everything else is a single name in a folder that is open.
// Nobody else may write there meanwhile.
//
// It must not know how layers are compressed, where they come from or how they
// are put on one another. Whiteouts become what overlayfs takes for them.
package untar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	whiteout       = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	copySize       = 128 << 10
	largeFile      = 64 << 20
)

// Options say what the folder is for.
type Options struct {
	// Lowest is set for a layer with none below it: its whiteouts hide nothing.
	Lowest bool
	// Entry is told of each entry before it is written; may be nil.
	Entry func(*tar.Header)
	// Ignored is told what could not be kept; may be nil.
	Ignored func(entry, what string)
}

// Supported says whether this kernel has what Extract needs.
func Supported() bool {
	fd, err := unix.Openat2(unix.AT_FDCWD, ".", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}

// Extract reads r to the archive's end.
func Extract(ctx context.Context, root string, r io.Reader, o Options) (err error) {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(top)
	x := &extraction{Options: o, root: path.Clean(root), top: top, ids: [2]int{os.Geteuid(), os.Getegid()}, umask: umask()}
	defer func() { x.at.close() }()
	t := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return x.dirTimes()
		}
		if err != nil {
			return err
		}
		if err := x.entry(ctx, h, t); err != nil {
			return fmt.Errorf("entry %.200q of the layer: %w", h.Name, err)
		}
	}
}

// extraction is the state of one Extract.
type extraction struct {
	Options
	root  string
	top   int // O_PATH descriptor of root
	ids   [2]int
	umask uint32
	at    folder // the one that was needed last
	dirs  []dirTime
	buf   []byte
}

func (x *extraction) entry(ctx context.Context, h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := path.Clean("/" + h.Name)
	if x.Entry != nil {
		x.Entry(h)
	}
	if name == "/" {
		return nil // the root belongs to no layer
	}
	dir, base := path.Split(name)
	if err := x.enter(path.Clean(dir)); err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteout) {
		return x.whiteout(h, base)
	}
	if err := x.replace(ctx, h, base, r); err != nil {
		return err
	}
	if err := x.attributes(h, base); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		// Whatever is made in it changes its time.
		x.dirs = append(x.dirs, dirTime{name, times(h)})
		return nil
	}
	if err := unix.UtimesNanoAt(x.at.fd, base, times(h), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// whiteout hides what layers below have. What this layer has stays, whichever
// comes first.
func (x *extraction) whiteout(h *tar.Header, base string) error {
	if base == whiteoutOpaque {
		if x.Lowest {
			return nil
		}
		return x.opaque(x.at.fd)
	}
	hidden := strings.TrimPrefix(base, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("whiteout of no name: %w", errdefs.ErrInvalidArgument)
	}
	if x.Lowest {
		return nil
	}
	err := unix.Mknodat(x.at.fd, hidden, unix.S_IFCHR, 0)
	if errors.Is(err, unix.EEXIST) {
		return x.opaqueIfFolder(hidden)
	}
	if err != nil {
		return fmt.Errorf("make whiteout: %w", err)
	}
	if err := unix.Fchownat(x.at.fd, hidden, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set owner of whiteout: %w", err)
	}
	return nil
}

func (x *extraction) opaqueIfFolder(base string) error {
	fd, err := unix.Openat(x.at.fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	defer unix.Close(fd)
	return x.opaque(fd)
}

func (x *extraction) opaque(fd int) error {
	if err := unix.Fsetxattr(fd, "trusted.overlay.opaque", []byte{'y'}, 0); err != nil {
		return fmt.Errorf("hide the folder of the layers below: %w", err)
	}
	return nil
}

// replace makes an entry. What an earlier one of the name made goes, unless
// both are folders.
func (x *extraction) replace(ctx context.Context, h *tar.Header, base string, r io.Reader) error {
	err := x.create(ctx, h, base, r)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(x.at.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("look at what is there: %w", err)
	}
	dir := h.Typeflag == tar.TypeDir
	if dir && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	if err := os.RemoveAll(x.at.path(base)); err != nil {
		return fmt.Errorf("remove an earlier entry of the name: %w", err)
	}
	if err := x.create(ctx, h, base, r); err != nil {
		return err
	}
	if dir && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 && !x.Lowest {
		return x.opaqueIfFolder(base) // it was the whiteout of the folder below
	}
	return nil
}

// create fails with EEXIST, and without having read anything, where the name is taken.
func (x *extraction) create(ctx context.Context, h *tar.Header, base string, r io.Reader) error {
	mode := uint32(h.FileInfo().Mode().Perm())
	switch h.Typeflag {
	case tar.TypeDir:
		return named("make folder", unix.Mkdirat(x.at.fd, base, mode))
	case tar.TypeReg:
		return x.file(ctx, base, mode, h.Size, r)
	case tar.TypeSymlink:
		return named("make symbolic link", unix.Symlinkat(h.Linkname, x.at.fd, base))
	case tar.TypeLink:
		return x.link(h.Linkname, base)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return x.node(h, base)
	}
	return fmt.Errorf("entries of type %q do not belong into layers: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// fits refuses a file that the file system has no room for before it is written:
// a sparse one has its size in a few bytes.
func (x *extraction) fits(size int64) error {
	if size < largeFile {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(x.at.fd, &st); err != nil {
		return fmt.Errorf("ask for free space: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); uint64(size) > free {
		return fmt.Errorf("file of %d bytes, and the disk has space for %d: %w", size, free, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (x *extraction) file(ctx context.Context, base string, mode uint32, size int64, r io.Reader) (err error) {
	if err := x.fits(size); err != nil {
		return err
	}
	fd, err := unix.Openat(x.at.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	defer func() {
		if closeErr := unix.Close(fd); err == nil && closeErr != nil {
			err = fmt.Errorf("write file: %w", closeErr)
		}
	}()
	if x.buf == nil {
		x.buf = make([]byte, copySize)
	}
	for {
		n, err := r.Read(x.buf)
		for b := x.buf[:n]; len(b) > 0; {
			written, err := unix.Write(fd, b)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("write file: %w", err)
			}
			b = b[max(written, 0):]
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// link makes a hard link to what an earlier entry made.
func (x *extraction) link(to, base string) error {
	dir, target := path.Split(path.Clean("/" + to))
	if target == "" {
		return fmt.Errorf("hard link to the root: %w", errdefs.ErrInvalidArgument)
	}
	from, err := x.open(path.Clean(dir), unix.O_PATH)
	if err != nil {
		return fmt.Errorf("make hard link: folder of its target: %w", err)
	}
	defer unix.Close(from)
	return named("make hard link", unix.Linkat(from, target, x.at.fd, base, 0))
}

func (x *extraction) node(h *tar.Header, base string) error {
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
	const most = 1<<32 - 1
	if h.Devmajor < 0 || h.Devmajor > most || h.Devminor < 0 || h.Devminor > most {
		return fmt.Errorf("no device has the number %d:%d: %w", h.Devmajor, h.Devminor, errdefs.ErrInvalidArgument)
	}
	dev := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	return named("make device", unix.Mknodat(x.at.fd, base, kind|uint32(h.Mode&0o7777), int(dev)))
}
