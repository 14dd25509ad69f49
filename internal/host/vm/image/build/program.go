package build

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// libraryDirs is where Debian and its relatives keep libraries.
func libraryDirs(machine elf.Machine) []string {
	dirs := []string{"/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"}
	switch machine {
	case elf.EM_X86_64:
		return append([]string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"}, dirs...)
	case elf.EM_AARCH64:
		return append([]string{"/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu"}, dirs...)
	}
	return dirs
}

// addProgram puts a program of this machine into the tree at target, with its
// loader and all libraries that it names, each at a path where that loader
// looks.
func addProgram(t tree, program, target string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	t.file(target, 0o755, data)
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz < 2 || p.Filesz > 4096 {
			continue
		}
		name := make([]byte, p.Filesz-1)
		if _, err := p.ReadAt(name, 0); err != nil {
			return fmt.Errorf("%s: read the loader's name: %w", program, err)
		}
		loader, err := os.ReadFile(string(name))
		if err != nil {
			return fmt.Errorf("the loader of %s: %w", program, err)
		}
		t.file(string(name), 0o755, loader)
	}
	return addLibraries(t, program, libraryDirs(f.Machine))
}

func addLibraries(t tree, file string, dirs []string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("libraries of %s: %w", file, err)
	}
	for _, name := range names {
		path, data, err := readLibrary(name, dirs)
		if err != nil {
			return fmt.Errorf("%s needs %s: %w", file, name, err)
		}
		if _, ok := t[clean(path)]; ok {
			continue
		}
		t.file(path, 0o644, data)
		if err := addLibraries(t, path, dirs); err != nil {
			return err
		}
	}
	return nil
}

func readLibrary(name string, dirs []string) (string, []byte, error) {
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return path, data, err
	}
	return "", nil, fmt.Errorf("not in %v: %w", dirs, errdefs.ErrNotFound)
}
