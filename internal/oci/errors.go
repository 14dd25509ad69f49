package oci

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
)

// named is a field of a request with its name, for checks that several share.
type named[T any] struct {
	field string
	value T
}

// shownBytes bounds how much of a caller's value an error repeats.
const shownBytes = 80

// show makes a value of a caller safe to print: quoted, and not endless.
func show(value any) string {
	s, ok := value.(string)
	if !ok {
		return fmt.Sprint(value)
	}
	if len(s) <= shownBytes {
		return strconv.Quote(s)
	}
	return fmt.Sprintf("%s… (%d bytes)", strconv.Quote(s[:shownBytes]), len(s))
}

// invalid says that a field has to be changed by whoever sent it; remedy says
// what it may be.
func invalid(field string, value any, remedy string) error {
	return fmt.Errorf("%s %s: %s: %w", field, show(value), remedy, errdefs.ErrInvalidArgument)
}

// missing says that a field must be set.
func missing(field string) error {
	return fmt.Errorf("%s is missing: set it: %w", field, errdefs.ErrInvalidArgument)
}

// impossible says that the request is well-formed and this node or handler
// cannot do it.
func impossible(field string, value any, remedy string) error {
	return fmt.Errorf("%s %s: %s: %w", field, show(value), remedy, errdefs.ErrFailedPrecondition)
}
