package osutil

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenInRoot(t *testing.T) {
	outside, root := t.TempDir(), t.TempDir()
	for path, content := range map[string]string{
		filepath.Join(outside, "secret"): "outside",
		filepath.Join(root, "in"):        "inside",
	} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"absolute": "/in", "climbs": "../../../../in", "leaves": filepath.Join(outside, "secret"),
		"viaproc": "/proc/self/root" + outside + "/secret", "loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]error{
		"in": nil, "/in": nil, "../../in": nil, "absolute": nil, "climbs": nil,
		"leaves": fs.ErrNotExist, "viaproc": fs.ErrNotExist, "loop": unix.ELOOP, outside + "/secret": fs.ErrNotExist,
	} {
		f, err := OpenInRoot(root, path, unix.O_RDONLY)
		if want != nil {
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", path, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if data, err := io.ReadAll(f); err != nil || string(data) != "inside" {
			t.Errorf("%s holds %q, %v", path, data, err)
		}
		f.Close()
	}
	if _, err := OpenInRoot(filepath.Join(root, "absent"), "in", unix.O_RDONLY); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "absent") {
		t.Errorf("absent root: %v", err)
	}
}
