package image

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxRef bounds what is handed to the reference grammar: 255 characters of
// name, 128 of tag, a digest, and room for a generous registry host.
const maxRef = 1024

// parseName turns every form of image name that Docker takes into its full
// form: "busybox" into docker.io/library/busybox:latest. A tag beside a digest
// is dropped, because the digest decides.
func parseName(s string) (reference.Named, error) {
	if len(s) > maxRef {
		return nil, fmt.Errorf("image name %s is longer than %d bytes: %w", quoted(s), maxRef, errdefs.ErrInvalidArgument)
	}
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return nil, fmt.Errorf("image name %s: %s: %w", quoted(s), clean(err.Error()), errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// parsePullName is parseName for a name that a registry shall resolve: an
// image ID names no registry.
func parsePullName(s string) (reference.Named, error) {
	if _, err := digest.Parse(s); err == nil {
		return nil, fmt.Errorf("%s is an image ID, a pull needs a name such as registry/repository:tag: %w", quoted(s), errdefs.ErrInvalidArgument)
	}
	return parseName(s)
}

// repoTag returns "name:tag" or "".
func repoTag(n reference.Named) string {
	if t, ok := n.(reference.Tagged); ok {
		return n.Name() + ":" + t.Tag()
	}
	return ""
}

// repoDigest returns "name@digest".
func repoDigest(n reference.Named, d digest.Digest) string {
	return n.Name() + "@" + d.String()
}

// recordName is the name of an image record: a tag may stand for an image on
// each platform that handlers have. The node's own platform has the plain name.
func recordName(name, platform string) string {
	if platform == "" {
		return name
	}
	return name + " " + platform
}

// plainName is a record's name without the platform.
func plainName(record string) string {
	name, _, _ := strings.Cut(record, " ")
	return name
}

// isID tells the record of an ID from the records of names.
func isID(record string) bool {
	_, err := digest.Parse(record)
	return err == nil
}

// quoted makes hostile text fit for an error message.
func quoted(s string) string {
	const most = 128
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}

// isHex says whether s could be a shortened image ID.
func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}
