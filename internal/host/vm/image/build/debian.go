package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// DefaultPackage is the kernel made for machines like ours: small, and with
// nothing but virtual hardware in it.
const DefaultPackage = "linux-image-cloud-amd64"

// unpacked is a kernel package whose files lie in a folder.
type unpacked struct {
	kernel  string // path
	modules string // folder
	version string
	source  string // package and its version
}

// fetchPackage downloads a Debian kernel package and unpacks it below dir.
// Packages are signed and apt checks them; nothing is installed.
func fetchPackage(ctx context.Context, name, cache, dir string) (unpacked, error) {
	for _, tool := range [...]string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return unpacked{}, fmt.Errorf("a kernel out of a Debian package needs %s, which is not here; name one with --kernel and --modules: %w", tool, errdefs.ErrNotFound)
		}
	}
	name, version, err := resolvePackage(ctx, name)
	if err != nil {
		return unpacked{}, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return unpacked{}, err
	}
	if _, err := run(ctx, cache, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name+"="+version); err != nil {
		return unpacked{}, fmt.Errorf("download the kernel package %s: %w", name, err)
	}
	// apt writes the colon of an epoch in another way.
	deb, err := filepath.Glob(filepath.Join(cache, name+"_"+strings.ReplaceAll(version, ":", "%3a")+"_*.deb"))
	if err != nil || len(deb) != 1 {
		return unpacked{}, errors.Join(fmt.Errorf("apt-get downloaded %s %s, and %d files in %s look like it", name, version, len(deb), cache), err)
	}
	if _, err := run(ctx, cache, "dpkg-deb", "--extract", deb[0], dir); err != nil {
		return unpacked{}, fmt.Errorf("unpack the kernel package %s: %w", deb[0], err)
	}
	u := unpacked{source: name + " " + version}
	return u, u.find(dir)
}

// kernelPackage is how a package is called that holds a kernel.
var kernelPackage = regexp.MustCompile(`^linux-image-[0-9]`)

// resolvePackage follows a package that only names the newest one.
func resolvePackage(ctx context.Context, name string) (pkg, version string, err error) {
	for range 3 {
		out, err := run(ctx, "/", "apt-cache", "show", "--no-all-versions", name)
		if err != nil {
			return "", "", fmt.Errorf("look up the kernel package %s (apt-get update fetches the lists): %w", name, err)
		}
		version = field(out, "Version")
		next := ""
		for d := range strings.SplitSeq(field(out, "Depends"), ",") {
			if words := strings.Fields(d); len(words) > 0 && kernelPackage.MatchString(words[0]) {
				next = words[0]
			}
		}
		if next == "" || kernelPackage.MatchString(name) {
			return name, version, nil
		}
		name = next
	}
	return "", "", fmt.Errorf("the package %s leads nowhere: %w", name, errdefs.ErrInvalidArgument)
}

func field(control []byte, name string) string {
	for line := range strings.Lines(string(control)) {
		if v, ok := strings.CutPrefix(line, name+": "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// find looks for the one kernel and its modules in an unpacked package.
func (u *unpacked) find(dir string) error {
	kernels, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return errors.Join(fmt.Errorf("%s holds %d kernels, not one: %w", u.source, len(kernels), errdefs.ErrInvalidArgument), err)
	}
	u.kernel = kernels[0]
	u.version = strings.TrimPrefix(filepath.Base(u.kernel), "vmlinuz-")
	for _, lib := range [...]string{"usr/lib/modules", "lib/modules"} {
		u.modules = filepath.Join(dir, lib, u.version)
		if _, err = os.Stat(u.modules); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s has no modules: %w", u.source, err)
}

// run gives a program's output, and what it complained about in the error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}
