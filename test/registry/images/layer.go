package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is the time of every file and image, so that the same input gives the
// same digests on every run.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// tree is the content of a layer by absolute path. The later entry of a path
// replaces the earlier, and parent folders that are not named are made 0755.
type tree map[string]node

// node is one file: exactly one of data, symlink and hardlink is meant, or
// none for an empty file; dir makes it a folder.
type node struct {
	mode     int64
	data     []byte
	symlink  string // target as it is written into the link
	hardlink string // absolute path of a regular file of the same tree
	dir      bool
}

func folder(mode int64) node            { return node{mode: mode, dir: true} }
func regular(mode int64, b []byte) node { return node{mode: mode, data: b} }
func text(s string) node                { return node{mode: 0o644, data: []byte(s)} }
func symlink(target string) node        { return node{mode: 0o777, symlink: target} }
func hardlink(target string) node       { return node{mode: 0o755, hardlink: target} }

// add copies the entries of other over t.
func (t tree) add(other tree) {
	for p, n := range other {
		t[p] = n
	}
}

func (t tree) withParents() {
	for p := range t {
		for d := path.Dir(p); d != "/"; d = path.Dir(d) {
			if _, ok := t[d]; !ok {
				t[d] = folder(0o755)
			}
		}
	}
}

// layer packs the tree. Paths are sorted and a hard link follows its target.
func (t tree) layer() (v1.Layer, error) {
	t.withParents()
	paths := make([]string, 0, len(t))
	for p := range t {
		paths = append(paths, p)
	}
	slices.SortFunc(paths, func(a, b string) int {
		if la, lb := t[a].hardlink != "", t[b].hardlink != ""; la != lb {
			if la {
				return 1
			}
			return -1
		}
		return strings.Compare(a, b)
	})
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, p := range paths {
		if err := t[p].write(tw, strings.TrimPrefix(p, "/")); err != nil {
			return nil, fmt.Errorf("pack %s: %w", p, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithCompressedCaching)
}

func (n node) write(tw *tar.Writer, name string) error {
	h := &tar.Header{Name: name, Mode: n.mode, ModTime: epoch, Format: tar.FormatPAX}
	switch {
	case n.dir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case n.symlink != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.symlink
	case n.hardlink != "":
		h.Typeflag, h.Linkname = tar.TypeLink, strings.TrimPrefix(n.hardlink, "/")
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(len(n.data))
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := tw.Write(n.data)
	return err
}

// image puts layers under a configuration.
func image(cfg v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Created = v1.Time{Time: epoch}
	if cfg.Env == nil {
		cfg.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	file.Config = cfg
	return mutate.ConfigFile(img, file)
}
