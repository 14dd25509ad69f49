package images

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// debian is a folder of unpacked Debian packages. Nothing is installed on the
// machine: packages are downloaded with apt-get and unpacked with dpkg.
type debian struct {
	dir string // the unpacked files, and a mark per package
}

// lock keeps two builders from unpacking into the folder at once.
func (d debian) lock() (unlock func(), err error) {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(d.dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// need downloads and unpacks packages that are not there yet.
func (d debian) need(ctx context.Context, packages ...string) error {
	marks := filepath.Join(d.dir, ".packages")
	if err := os.MkdirAll(marks, 0o755); err != nil {
		return err
	}
	packages = slices.DeleteFunc(slices.Clone(packages), func(p string) bool {
		_, err := os.Stat(filepath.Join(marks, p))
		return err == nil
	})
	if len(packages) == 0 {
		return nil
	}
	tmp, err := os.MkdirTemp(d.dir, ".download")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	download := func() ([]byte, error) {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-o", "APT::Sandbox::User=root", "download"}, packages...)...)
		cmd.Dir = tmp
		return cmd.CombinedOutput()
	}
	if _, err := download(); err != nil {
		// A machine that has no package lists yet, or lists so old that the
		// mirror has newer files only.
		if out, uerr := exec.CommandContext(ctx, "apt-get", "-qq", "update").CombinedOutput(); uerr != nil {
			return fmt.Errorf("apt-get update: %w: %s", uerr, out)
		}
		if msg, err := download(); err != nil {
			return fmt.Errorf("apt-get download %s: %w: %s", strings.Join(packages, " "), err, msg)
		}
	}
	return d.unpack(ctx, tmp, marks, packages)
}

func (d debian) unpack(ctx context.Context, from, marks string, packages []string) error {
	for _, p := range packages {
		debs, err := filepath.Glob(filepath.Join(from, p+"_*.deb"))
		if err != nil || len(debs) != 1 {
			return fmt.Errorf("apt-get download %s left %d files", p, len(debs))
		}
		if msg, err := exec.CommandContext(ctx, "dpkg", "-x", debs[0], d.dir).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack package %s: %w: %s", p, err, msg)
		}
		depends, err := exec.CommandContext(ctx, "dpkg-deb", "-f", debs[0], "Pre-Depends", "Depends").Output()
		if err != nil {
			return fmt.Errorf("read package %s: %w", p, err)
		}
		if err := os.WriteFile(filepath.Join(marks, p), depends, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// libraries names the library packages that the unpacked packages depend on
// directly, as far as they are not unpacked themselves.
func (d debian) libraries() ([]string, error) {
	marks, err := filepath.Glob(filepath.Join(d.dir, ".packages", "*"))
	if err != nil {
		return nil, err
	}
	var libs []string
	for _, m := range marks {
		b, err := os.ReadFile(m)
		if err != nil {
			return nil, err
		}
		for _, w := range strings.FieldsFunc(string(b), func(r rune) bool { return r == ',' || r == '\n' || r == '|' }) {
			w = strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(w), "Depends:"), "Pre-Depends:")
			name, _, _ := strings.Cut(strings.TrimSpace(w), " ")
			name, _, _ = strings.Cut(name, ":")
			if !strings.HasPrefix(name, "lib") && !strings.HasPrefix(name, "zlib") {
				continue
			}
			if _, err := os.Stat(filepath.Join(d.dir, ".packages", name)); errors.Is(err, fs.ErrNotExist) {
				libs = append(libs, name)
			}
		}
	}
	slices.Sort(libs)
	return slices.Compact(libs), nil
}

// executable returns the program at one of the paths with its interpreter and
// the shared libraries it needs, each at its own path.
func (d debian) executable(ctx context.Context, paths ...string) (tree, error) {
	for {
		t, missing, err := d.closure(paths)
		if err != nil || missing == "" {
			return t, err
		}
		libs, err := d.libraries()
		if err != nil {
			return nil, err
		}
		if len(libs) == 0 {
			return nil, fmt.Errorf("%s needs %s, which no package it depends on holds", paths[0], missing)
		}
		if err := d.need(ctx, libs...); err != nil {
			return nil, err
		}
	}
}

// closure follows the dynamic section of the first of paths that exists.
// missing names a library that is not unpacked.
func (d debian) closure(paths []string) (t tree, missing string, err error) {
	start, data, err := d.find(paths)
	if err != nil {
		return nil, "", err
	}
	t = tree{start: regular(0o755, data)}
	todo := []string{start}
	for len(todo) > 0 {
		needs, err := dependencies(t[todo[0]].data)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", todo[0], err)
		}
		todo = todo[1:]
		for _, candidates := range needs {
			p, data, err := d.find(candidates)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, candidates[0], nil
			}
			if err != nil {
				return nil, "", err
			}
			if _, seen := t[p]; !seen {
				t[p] = regular(0o755, data)
				todo = append(todo, p)
			}
		}
	}
	return t, "", nil
}

// dependencies lists, for each file that a program or library wants loaded, the
// paths at which it may be.
func dependencies(binary []byte) ([][]string, error) {
	e, err := elf.NewFile(bytes.NewReader(binary))
	if err != nil {
		return nil, err
	}
	var needs [][]string
	if s := e.Section(".interp"); s != nil {
		b, err := s.Data()
		if err != nil {
			return nil, err
		}
		interp := strings.TrimRight(string(b), "\x00")
		needs = append(needs, []string{interp})
	}
	libs, err := e.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, l := range libs {
		var at []string
		for _, dir := range []string{"/lib/*-linux-gnu/", "/usr/lib/*-linux-gnu/", "/lib64/", "/lib/", "/usr/lib/", "/usr/lib64/"} {
			at = append(at, dir+l)
		}
		needs = append(needs, at)
	}
	return needs, nil
}

// find reads the first file that matches one of the patterns and returns the
// path under which it matched.
func (d debian) find(patterns []string) (string, []byte, error) {
	for _, p := range patterns {
		hits, err := filepath.Glob(filepath.Join(d.dir, p))
		if err != nil {
			return "", nil, err
		}
		for _, h := range hits {
			b, err := d.read(h)
			if err != nil {
				return "", nil, err
			}
			return strings.TrimPrefix(h, d.dir), b, nil
		}
	}
	return "", nil, fmt.Errorf("%s: %w", strings.Join(patterns, ", "), fs.ErrNotExist)
}

// read follows links by hand: an absolute one means a file of the packages,
// not of this machine (libc6 links its loader so).
func (d debian) read(path string) ([]byte, error) {
	for range 10 {
		target, err := os.Readlink(path)
		if err != nil {
			return os.ReadFile(path)
		}
		if filepath.IsAbs(target) {
			path = filepath.Join(d.dir, target)
		} else {
			path = filepath.Join(filepath.Dir(path), target)
		}
	}
	return nil, fmt.Errorf("%s: too many links", path)
}
