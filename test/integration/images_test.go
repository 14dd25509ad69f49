package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

type imageConfig = v1.Config

// file is an entry of a layer: a link when link is set, a folder when its path
// ends in a slash.
type file struct {
	path string
	data []byte
	link string
}

// hostileImage is busybox with a changed configuration and one more layer.
func hostileImage(t *testing.T, change func(*imageConfig), files ...file) v1.Image {
	t.Helper()
	img := here.base(t)
	if len(files) > 0 {
		var err error
		if img, err = mutate.AppendLayers(img, layer(t, files)); err != nil {
			t.Fatal(err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	if change != nil {
		change(&cf.Config)
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

func layer(t *testing.T, files []file) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: strings.TrimPrefix(f.path, "/"), Mode: 0o755, Size: int64(len(f.data)), Typeflag: tar.TypeReg}
		if strings.HasSuffix(f.path, "/") {
			h.Typeflag = tar.TypeDir
		}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// push puts an image into the registry and gives a reference to it.
func push(t *testing.T, img v1.Image) string {
	t.Helper()
	repo := fmt.Sprintf("special/i%d:1", serial.Add(1))
	if err := here.registry.Push(t.Context(), repo, img); err != nil {
		t.Fatal(err)
	}
	return "test.example/" + repo
}
