package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"syscall"
	"unicode"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

var (
	errSchema1 = fmt.Errorf("image manifest of schema 1, which is no longer supported; push the image again with a current tool: %w", errdefs.ErrInvalidArgument)
	errLied    = fmt.Errorf("the registry sent other bytes than the digest promises: %w", errdefs.ErrDataLoss)
	errNoSpace = fmt.Errorf("the file system of the image store is nearly full: %w", errdefs.ErrResourceExhausted)
	errClosing = fmt.Errorf("the image store is closing: %w", errdefs.ErrUnavailable)
)

// pullError is a failed pull: a sentence without secrets, and a class.
type pullError struct {
	text  string
	class error
}

func (e *pullError) Error() string { return e.text }
func (e *pullError) Unwrap() error { return e.class }

// explain turns whatever the libraries returned into an error with a class
// that a gRPC code follows from. secrets are cut out of the text.
func explain(ref string, err error, secrets []string) error {
	hint, class := classify(err)
	text := err.Error()
	if m := registryMessage(err); m != "" && !strings.Contains(text, m) {
		text += ": registry says " + quoted(m)
	}
	for _, s := range secrets {
		if len(s) > 3 {
			text = strings.ReplaceAll(text, s, "***")
		}
	}
	text = fmt.Sprintf("pull image %s: %s", quoted(ref), clean(text))
	if hint != "" {
		text += " (" + hint + ")"
	}
	return &pullError{text, class}
}

func classify(err error) (hint string, class error) {
	var status remoteerrors.ErrUnexpectedStatus
	var netErr net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return "", context.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return "", context.DeadlineExceeded
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "free disk space or remove unused images", errdefs.ErrResourceExhausted
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return "give credentials for this registry, or check that the repository exists", errdefs.ErrUnauthenticated
	case errors.As(err, &status):
		return classifyStatus(status.StatusCode)
	}
	for _, c := range []error{
		errdefs.ErrDataLoss, errdefs.ErrResourceExhausted, errdefs.ErrInvalidArgument, errdefs.ErrNotFound,
		errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented,
		errdefs.ErrUnavailable,
	} {
		if errors.Is(err, c) {
			return "", c
		}
	}
	if errors.As(err, &netErr) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return "the registry or the way to it failed; the next pull resumes", errdefs.ErrUnavailable
	}
	return "", errdefs.ErrUnknown
}

func classifyStatus(code int) (hint string, class error) {
	switch {
	case code == http.StatusUnauthorized:
		return "give credentials for this registry, or check that the repository exists", errdefs.ErrUnauthenticated
	case code == http.StatusForbidden:
		return "the credentials do not suffice for this repository", errdefs.ErrPermissionDenied
	case code == http.StatusNotFound:
		return "", errdefs.ErrNotFound
	case code == http.StatusTooManyRequests:
		return "the registry limits the rate of pulls", errdefs.ErrResourceExhausted
	case code >= 500:
		return "the registry has a problem", errdefs.ErrUnavailable
	}
	return "", errdefs.ErrUnknown
}

// registryMessage is what the registry gave as a reason, when it used the
// form of the distribution specification. Other bodies stay unread: they may
// hold anything.
func registryMessage(err error) string {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) {
		return ""
	}
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(status.Body, &body) != nil || len(body.Errors) == 0 {
		return ""
	}
	if m := body.Errors[0].Message; m != "" {
		return m
	}
	return body.Errors[0].Code
}

// address matches a URL up to its query or fragment, which may be a signature.
var address = regexp.MustCompile(`https?://[^\s"'?#]+[?#][^\s"']*`)

// clean makes text of foreign origin fit for a log line or an error: one line,
// printable, bounded, and no secret parts of URLs.
func clean(text string) string {
	const most = 1024
	if len(text) > 8*most {
		text = text[:8*most]
	}
	text = address.ReplaceAllStringFunc(text, func(a string) string {
		if u, err := url.Parse(a); err == nil {
			u.User, u.Fragment = nil, ""
			if u.RawQuery != "" {
				u.RawQuery = "…"
			}
			return u.String()
		}
		return a[:strings.IndexAny(a, "?#")]
	})
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
	if len(text) > most {
		text = text[:most] + "…"
	}
	return text
}
