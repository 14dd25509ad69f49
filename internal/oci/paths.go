package oci

import (
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxPath is the kernel's PATH_MAX without the closing NUL.
	maxPath = 4095
	// maxImageVolumes is far above what any real image declares.
	maxImageVolumes = 256
)

// LogPath joins the pod's log directory and the container's log path; it is
// empty when either is, and an error when the result would lie elsewhere.
func LogPath(cfg *runtimeapi.ContainerConfig, sandbox *runtimeapi.PodSandboxConfig) (string, error) {
	dir, path := sandbox.GetLogDirectory(), cfg.GetLogPath()
	if dir == "" || path == "" {
		return "", nil
	}
	if err := checkLogDirectory(dir); err != nil {
		return "", err
	}
	if filepath.IsAbs(path) {
		return "", invalid("log_path", path, "give a path relative to log_directory")
	}
	if err := checkPath("log_path", path); err != nil {
		return "", err
	}
	full := filepath.Join(dir, path)
	if len(full) > maxPath {
		return "", invalid("log_path", path, "log_directory and log_path together are longer than 4095 bytes")
	}
	if full == filepath.Clean(dir) {
		return "", invalid("log_path", path, "name a file below log_directory")
	}
	return full, nil
}

func checkLogDirectory(dir string) error {
	if !filepath.IsAbs(dir) {
		return invalid("log_directory", dir, "give an absolute path")
	}
	return checkPath("log_directory", dir)
}

// checkPath refuses what no honest path holds: "..", control characters, more
// bytes than the kernel takes.
func checkPath(field, path string) error {
	switch {
	case len(path) > maxPath:
		return invalid(field, path, "paths have at most 4095 bytes")
	case hasDotDot(path):
		return invalid(field, path, `".." is not allowed`)
	case !printable(path):
		return invalid(field, path, "control characters and invalid UTF-8 are not allowed")
	}
	return nil
}

func hasDotDot(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// printable holds for text that keeps a line and a terminal as they were.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// beneath says whether path is dir or lies in it; both are clean and absolute.
func beneath(path, dir string) bool {
	if dir == "/" {
		return strings.HasPrefix(path, "/")
	}
	rest, ok := strings.CutPrefix(path, dir)
	return ok && (rest == "" || rest[0] == '/')
}

// inContainer makes a container path absolute and clean, which is how runtimes
// read relative ones.
func inContainer(path string) string { return filepath.Join("/", path) }

// ImageVolumes returns the VOLUME paths of a hostile image: absolute, clean,
// sorted, without duplicates. Paths that climb, and those where an empty
// folder would replace what confines the container, are errors.
func ImageVolumes(img imagespec.ImageConfig) ([]string, error) {
	if len(img.Volumes) > maxImageVolumes {
		return nil, invalid("number of VOLUMEs of the image", len(img.Volumes), "at most 256 are supported; use an image with fewer")
	}
	var paths []string
	for volume := range img.Volumes {
		if err := checkPath("VOLUME of the image", volume); err != nil {
			return nil, err
		}
		path := inContainer(volume)
		if err := CheckVolume(volume, path); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return slices.Compact(paths), nil
}

// CheckVolume refuses a VOLUME of an image for the place at that it lies, be
// it named so or reached through links of the image.
func CheckVolume(volume, place string) error {
	if place == "/" || place == "/sys" || place == "/dev" || beneath(place, "/proc") {
		return invalid("VOLUME of the image", volume, "an image may not replace /, /proc, /sys or /dev; remove the VOLUME or use another image")
	}
	return nil
}
