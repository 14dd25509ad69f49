package untar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var then = time.Unix(1600000000, 0)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are written by root")
	}
}

func header(kind byte, name string, mode int64) tar.Header {
	return tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: then, Format: tar.FormatPAX}
}

func file(name string, mode int64) tar.Header { return header(tar.TypeReg, name, mode) }
func dir(name string, mode int64) tar.Header  { return header(tar.TypeDir, name, mode) }

func link(kind byte, name, to string) tar.Header {
	h := header(kind, name, 0o777)
	h.Linkname = to
	return h
}

func with(h tar.Header, change func(*tar.Header)) tar.Header {
	change(&h)
	return h
}

func of(uid, gid int) func(*tar.Header) { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

func attribute(name, value string) func(*tar.Header) {
	return func(h *tar.Header) { h.PAXRecords = map[string]string{paxXattr + name: value} }
}

func pack(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, h := range headers {
		body := fmt.Appendf(nil, "%d %s", i, strings.Repeat("x", i*1000))
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// describe lists a tree with all that an archive can set.
func describe(t testing.TB, root string) []string {
	t.Helper()
	inodes := map[uint64]string{}
	var out []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		line := fmt.Sprintf("%s %o %d:%d %x", name, st.Mode, st.Uid, st.Gid, st.Rdev)
		// What makes a folder that no entry describes has a time of its own.
		if mtime := time.Unix(st.Mtim.Unix()); mtime.Before(then.Add(time.Hour)) {
			line += fmt.Sprint(" at ", mtime.UnixNano())
		}
		if first, ok := inodes[st.Ino]; ok {
			line += " is " + first
		}
		inodes[st.Ino] = name
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", b)
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		out = append(out, line+attributesOf(t, path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func attributesOf(t testing.TB, path string) string {
	t.Helper()
	list := make([]byte, 4096)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimRight(string(list[:n]), "\x00"), "\x00")
	slices.Sort(names)
	var out string
	for _, name := range names {
		if name == "" {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		out += fmt.Sprintf(" %s=%q", name, value[:n])
	}
	return out
}

// both unpacks an archive with Extract and with containerd's library.
func both(t testing.TB, raw []byte) (ours, theirs []string, err, theirErr error) {
	t.Helper()
	a, b := t.TempDir(), t.TempDir()
	err = Extract(t.Context(), a, bytes.NewReader(raw), Options{})
	_, theirErr = archive.Apply(t.Context(), b, bytes.NewReader(raw), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	return describe(t, a), describe(t, b), err, theirErr
}

// defaultACL grants all to a group, and masks what others get.
const defaultACL = "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// TestLikeContainerd compares with the library that containerd unpacks with.
func TestLikeContainerd(t *testing.T) {
	needRoot(t)
	for name, headers := range map[string][]tar.Header{
		"files":      {dir("a", 0o755), file("a/1", 0o644), file("a/2", 0o600), file("a/3", 0o777), file("a/4", 0o666), file("top", 0o640)},
		"no folders": {file("a/b/c/1", 0o644), file("a/b/2", 0o644), dir("a", 0o700)},
		"owners": {with(dir("a", 0o755), of(1, 2)), with(file("a/1", 0o644), of(1, 2)), file("a/2", 0o644),
			with(link(tar.TypeSymlink, "a/3", "1"), of(5, 6)), with(file("a/4", 0o644), of(0, 9))},
		"set-id":         {with(file("1", 0o4755), of(7, 8)), file("2", 0o2711), file("3", 0o6777), dir("d", 0o1777), with(dir("e", 0o2775), of(0, 50))},
		"set-gid folder": {with(dir("e", 0o2775), of(0, 50)), file("e/1", 0o644), dir("e/sub", 0o755), file("e/sub/2", 0o644)},
		"default ACL":    {with(dir("d", 0o755), attribute("system.posix_acl_default", defaultACL)), file("d/1", 0o666), dir("d/e", 0o777), file("d/e/2", 0o644)},
		"attributes": {with(file("1", 0o755), attribute("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
			with(file("2", 0o644), attribute("user.note", "n")), with(link(tar.TypeSymlink, "3", "2"), attribute("user.note", "n")),
			with(dir("4", 0o755), attribute("trusted.overlay.opaque", "y")), with(file("5", 0o644), attribute("trusted.x", "y"))},
		"links": {file("1", 0o644), link(tar.TypeLink, "2", "1"), link(tar.TypeLink, "d/3", "/1"), link(tar.TypeSymlink, "4", "1"), link(tar.TypeLink, "5", "4"),
			link(tar.TypeSymlink, "6", "nowhere")},
		"links with attributes": {file("1", 0o644), with(link(tar.TypeLink, "2", "1"), func(h *tar.Header) { h.Mode, h.Uid = 0o600, 3 })},
		"through links":         {dir("d", 0o755), link(tar.TypeSymlink, "to", "d"), file("to/1", 0o644), link(tar.TypeSymlink, "abs", "/d"), file("abs/2", 0o644), link(tar.TypeLink, "3", "to/1")},
		"through dangling":      {link(tar.TypeSymlink, "to", "d/e"), file("to/1", 0o644), link(tar.TypeSymlink, "out", "../../x"), file("out/2", 0o644)},
		"replaced": {file("1", 0o644), file("1", 0o600), dir("2", 0o755), file("2/x", 0o644), file("2", 0o644), link(tar.TypeSymlink, "3", "1"), file("3", 0o644),
			file("4", 0o644), dir("4", 0o750), dir("5", 0o755), file("5/x", 0o644), dir("5", 0o700), dir("6", 0o755), file("6/y", 0o644), link(tar.TypeSymlink, "6", "5"), file("6/z", 0o644),
			header(tar.TypeFifo, "7", 0o600), header(tar.TypeFifo, "7", 0o644)},
		"nodes": {with(header(tar.TypeChar, "null", 0o666), func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }),
			with(header(tar.TypeBlock, "disk", 0o660), func(h *tar.Header) { h.Devmajor, h.Devminor = 259, 1048575 }), header(tar.TypeFifo, "fifo", 0o622)},
		"whiteouts":         {file("d/.wh.gone", 0), with(file(".wh.top", 0), of(3, 4)), file("d/.wh..wh..opq", 0), file("e/.wh..wh..opq", 0), file("e/1", 0o644)},
		"whiteout replaced": {file(".wh.1", 0), file("1", 0o644)},
		"times": {with(file("1", 0o644), func(h *tar.Header) { h.ModTime = time.Unix(-5, 0) }), with(file("2", 0o644), func(h *tar.Header) { h.ModTime = time.Unix(1234567890, 987654321) }),
			with(file("3", 0o644), func(h *tar.Header) { h.AccessTime = time.Unix(1500000000, 5) }), dir("d", 0o755), file("d/1", 0o644)},
		"names":          {file("./a", 0o644), file("/b", 0o644), file("c/../d", 0o644), file("../../e", 0o644), dir("./", 0o700), dir("x/./y/", 0o755)},
		"global":         {{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}, Name: "pax_global_header"}, file("1", 0o644)},
		"link to itself": {file("1", 0o644), link(tar.TypeLink, "1", "1")},
		"link nowhere":   {link(tar.TypeLink, "1", "2")},
		"no whiteout":    {file(".wh.", 0)},
		"whiteout of ..": {file("d/.wh...", 0)},
		"below a file":   {file("1", 0o644), file("1/2", 0o644)},
		"loop":           {link(tar.TypeSymlink, "a", "b"), link(tar.TypeSymlink, "b", "a"), file("a/1", 0o644)},
		"long":           {file(strings.Repeat("n", 300), 0o644)},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs, err, theirErr := both(t, pack(t, headers...))
			if (err == nil) != (theirErr == nil) {
				t.Fatalf("error %v, containerd's %v", err, theirErr)
			}
			if err == nil && !slices.Equal(ours, theirs) {
				t.Errorf("tree\n%s\ncontainerd's\n%s", strings.Join(ours, "\n"), strings.Join(theirs, "\n"))
			}
			if err != nil {
				t.Log(err)
			}
		})
	}
}

// TestWhiteouts: they hide what layers below have, never what the layer has
// itself, in whatever order they come. containerd's library refuses some of
// these archives.
func TestWhiteouts(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		lowest  bool
		headers []tar.Header
		want    []string // name, and what overlayfs makes of it
	}{
		"after the file":    {headers: []tar.Header{file("1", 0o644), file(".wh.1", 0)}, want: []string{"/1 file"}},
		"before the folder": {headers: []tar.Header{file(".wh.d", 0), dir("d", 0o755), file("d/1", 0o644)}, want: []string{"/d opaque", "/d/1 file"}},
		"after the folder":  {headers: []tar.Header{dir("d", 0o755), file("d/1", 0o644), file(".wh.d", 0)}, want: []string{"/d opaque", "/d/1 file"}},
		"nothing below":     {lowest: true, headers: []tar.Header{dir("d", 0o755), file("1", 0o644), file(".wh.1", 0), file(".wh.2", 0), file("d/.wh..wh..opq", 0)}, want: []string{"/1 file", "/d folder"}},
		"a plain device":    {headers: []tar.Header{with(header(tar.TypeChar, "d", 0o666), func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }), dir("d", 0o755)}, want: []string{"/d folder"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := Extract(t.Context(), root, bytes.NewReader(pack(t, c.headers...)), Options{Lowest: c.lowest}); err != nil {
				t.Fatal(err)
			}
			var got []string
			_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				kind := "file"
				switch {
				case err != nil || path == root:
					return err
				case d.IsDir() && strings.Contains(attributesOf(t, path), `trusted.overlay.opaque="y"`):
					kind = "opaque"
				case d.IsDir():
					kind = "folder"
				case !d.Type().IsRegular():
					kind = d.Type().String()
				}
				got = append(got, strings.TrimPrefix(path, root)+" "+kind)
				return nil
			})
			if !slices.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// TestRefused: entries that no layer may have end the unpacking with a sentence
// that names the entry.
func TestRefused(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		header tar.Header
		want   string
	}{
		"type":   {header('V', "volume", 0), `entry "volume" of the layer: entries of type 'V'`},
		"device": {with(header(tar.TypeChar, "null", 0), func(h *tar.Header) { h.Devmajor, h.Format = 1<<33, tar.FormatGNU }), `no device has the number`},
		"link":   {link(tar.TypeLink, "l", "/"), `hard link to the root`},
	} {
		t.Run(name, func(t *testing.T) {
			err := Extract(t.Context(), t.TempDir(), bytes.NewReader(pack(t, c.header)), Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %s", err, c.want)
			}
		})
	}
}

// sparse is a file of any size without a byte in the archive, as GNU tar 1.0
// has it, which Go's writer does not make.
func sparse(size int64) []byte {
	var out bytes.Buffer
	entry := func(kind byte, name string, body []byte) {
		b := make([]byte, 512)
		copy(b, name)
		copy(b[100:], "0000644\x000000000\x000000000\x00")
		copy(b[124:], fmt.Sprintf("%011o\x0000000000000\x00        ", len(body)))
		b[156] = kind
		copy(b[257:], "ustar\x0000")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		out.Write(b)
		out.Write(body)
		out.Write(make([]byte, (512-len(body)%512)%512))
	}
	var records strings.Builder
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=big", fmt.Sprint("GNU.sparse.realsize=", size)} {
		n := len(r) + 2 // with a space and the line's end
		for n != len(fmt.Sprint(n))+len(r)+2 {
			n = len(fmt.Sprint(n)) + len(r) + 2
		}
		fmt.Fprintf(&records, "%d %s\n", n, r)
	}
	entry('x', "PaxHeaders/big", []byte(records.String()))
	table := make([]byte, 512)
	copy(table, fmt.Sprintf("1\n%d\n0\n", size))
	entry('0', "GNUSparseFile/big", table)
	out.Write(make([]byte, 1024))
	return out.Bytes()
}

// TestSparse: a small one is zeros; a file for which there is no room is not begun.
func TestSparse(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	if err := Extract(t.Context(), root, bytes.NewReader(sparse(1<<20)), Options{}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "big")); err != nil || !bytes.Equal(b, make([]byte, 1<<20)) {
		t.Errorf("%d bytes %v", len(b), err)
	}
	root = t.TempDir()
	err := Extract(t.Context(), root, bytes.NewReader(sparse(1<<60)), Options{})
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), `entry "big" of the layer: file of 1152921504606846976 bytes, and the disk has space for`) {
		t.Errorf("error %v", err)
	}
	if left, err := os.ReadDir(root); err != nil || len(left) > 0 {
		t.Errorf("left is %v %v", left, err)
	}
}

func TestCancelled(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Extract(ctx, t.TempDir(), bytes.NewReader(pack(t, file("1", 0o644))), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// FuzzExtract: an archive, whatever it holds, changes nothing outside of its
// folder, and leaves no descriptor open.
func FuzzExtract(f *testing.F) {
	needRoot(f)
	f.Add(pack(f, link(tar.TypeSymlink, "a", "/"), file("a/../../canary", 0o777)))
	f.Add(pack(f, link(tar.TypeLink, "h", "../canary"), file("h", 0o777)))
	f.Add(pack(f, link(tar.TypeSymlink, "out", "../"), file("out/.wh.canary", 0), file("out/.wh..wh..opq", 0)))
	f.Add(pack(f, link(tar.TypeSymlink, "p", "/proc/self/root"), file("p/1", 0o644), with(dir("d", 0o2777), of(1, 1)), file("d/1", 0o4777)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.Contains(b, []byte("GNU.sparse")) || len(b) > 1<<16 {
			t.Skip("would write for long")
		}
		base := t.TempDir()
		canary, root := filepath.Join(base, "canary"), filepath.Join(base, "root")
		if err := errors.Join(os.WriteFile(canary, []byte("untouched"), 0o640), os.Mkdir(root, 0o755)); err != nil {
			t.Fatal(err)
		}
		before := describe(t, base)
		_ = Extract(t.Context(), root, bytes.NewReader(b), Options{})
		outside := slices.DeleteFunc(describe(t, base), func(line string) bool { return strings.HasPrefix(line, "/root") })
		if want := slices.DeleteFunc(before, func(line string) bool { return strings.HasPrefix(line, "/root") }); !slices.Equal(outside, want) {
			t.Errorf("outside is %v, was %v", outside, want)
		}
	})
}
