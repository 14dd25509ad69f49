package build

import (
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// tree is a file system to be written as a cpio archive of the form "newc",
// the one that kernels unpack. All files belong to root and have no times.
type tree map[string]node

type node struct {
	mode uint32 // type and permissions
	data []byte // of a file, or the target of a symbolic link
	// major and minor of a device.
	major, minor uint32
}

func (t tree) file(name string, mode uint32, data []byte) {
	t[clean(name)] = node{mode: unix.S_IFREG | mode, data: data}
}

func (t tree) dir(name string, mode uint32) { t[clean(name)] = node{mode: unix.S_IFDIR | mode} }

func (t tree) char(name string, mode, major, minor uint32) {
	t[clean(name)] = node{mode: unix.S_IFCHR | mode, major: major, minor: minor}
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// trailer is the name that ends an archive.
const trailer = "TRAILER!!!"

// writeTo writes the archive, folders that nobody named included, in the order
// of the names: a folder comes before what is in it.
func (t tree) writeTo(w io.Writer) error {
	for name := range t {
		for up := path.Dir(name); up != "."; up = path.Dir(up) {
			if _, ok := t[up]; !ok {
				t.dir(up, 0o755)
			}
		}
	}
	names := make([]string, 0, len(t))
	for name := range t {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if err := writeRecord(w, i+1, name, t[name]); err != nil {
			return fmt.Errorf("write %s into the initial file system: %w", name, err)
		}
	}
	return writeRecord(w, 0, trailer, node{})
}

func writeRecord(w io.Writer, inode int, name string, n node) error {
	if int64(len(n.data)) > 0xffffffff {
		return errors.New("the file is too big for the format")
	}
	links := 1
	if n.mode&unix.S_IFMT == unix.S_IFDIR {
		links = 2
	}
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		inode, n.mode, 0, 0, links, 0, len(n.data), 0, 0, n.major, n.minor, len(name)+1, 0)
	_, err := w.Write(slices.Concat([]byte(header), []byte(name), padding(len(header)+len(name), true),
		n.data, padding(len(n.data), false)))
	return err
}

// padding fills up to a multiple of four bytes, with at least one zero after a name.
func padding(size int, name bool) []byte {
	n := -size & 3
	if name {
		n = 4 - size&3
	}
	return make([]byte, n)
}
