package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Files of a guest's folder.
const (
	kernelFile   = "kernel"
	initrdFile   = "initrd"
	manifestFile = "guest.json"
)

// Without a regular expression, whose compilation each guest's start would
// wait for.
const (
	firstOfName = "abcdefghijklmnopqrstuvwxyz0123456789"
	restOfName  = firstOfName + "._-"
)

// CheckName tells whether a guest can have that name.
func CheckName(name string) error {
	if name == "" || len(name) > 63 || !strings.Contains(firstOfName, name[:1]) || strings.Trim(name, restOfName) != "" {
		return fmt.Errorf("%q is no name for a guest; it has 1 to 63 of a-z, 0-9, dot, dash and underscore: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Put writes a guest, in place of an older one of its name; scrap is a folder
// beside the guests for what is unfinished, which the caller removes.
func Put(root, name, scrap string, m Manifest, kernel, initrd []byte) error {
	fresh := filepath.Join(scrap, "guest")
	if err := write(fresh, m, kernel, initrd); err != nil {
		return fmt.Errorf("write guest %q: %w", name, err)
	}
	if err := replace(fresh, filepath.Join(root, name), scrap); err != nil {
		return fmt.Errorf("put guest %q in its place: %w", name, err)
	}
	return nil
}

func write(dir string, m Manifest, kernel, initrd []byte) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for name, data := range map[string][]byte{kernelFile: kernel, initrdFile: initrd, manifestFile: append(b, '\n')} {
		if err := writeSynced(filepath.Join(dir, name), data); err != nil {
			return err
		}
	}
	return nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// replace puts fresh at place at once; what was there is left in scrap.
// Machines that run have their files open and do not notice.
func replace(fresh, place, scrap string) error {
	err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, place, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return os.Rename(fresh, place)
	}
	if errors.Is(err, unix.EINVAL) { // a file system that cannot exchange
		if err := os.Rename(place, filepath.Join(scrap, "old")); err != nil {
			return err
		}
		return os.Rename(fresh, place)
	}
	return err
}

func open(root, name string) (Guest, error) {
	if err := CheckName(name); err != nil {
		return Guest{}, err
	}
	dir := filepath.Join(root, name)
	g := Guest{Name: name, Dir: dir, Kernel: filepath.Join(dir, kernelFile), Initrd: filepath.Join(dir, initrdFile)}
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return g, fmt.Errorf("there is no guest %q in %s; build it with \"cloister guest build\": %w", name, root, errdefs.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &g.Manifest)
	}
	if err != nil {
		return g, fmt.Errorf("read guest %q: %w; build it again with \"cloister guest build\"", name, err)
	}
	st, err := os.Stat(g.Initrd)
	if err != nil {
		return g, fmt.Errorf("guest %q is not whole: %w; build it again with \"cloister guest build\"", name, err)
	}
	g.Built = st.ModTime()
	return g, nil
}

func list(root string) ([]Guest, error) {
	entries, err := os.ReadDir(root)
	all := []Guest{}
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list guests: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		g, err := open(root, e.Name())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, g)
	}
	return all, errors.Join(errs...)
}
