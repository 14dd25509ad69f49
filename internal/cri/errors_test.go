package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestErrorCodes(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	wrap := func(err error) error { return fmt.Errorf("make a pod: %w", fmt.Errorf("attach: %w", err)) }
	for name, tc := range map[string]struct {
		ctx  context.Context
		err  error
		want codes.Code
	}{
		"none":           {err: nil, want: codes.OK},
		"not found":      {err: wrap(errdefs.ErrNotFound), want: codes.NotFound},
		"invalid":        {err: wrap(errdefs.ErrInvalidArgument), want: codes.InvalidArgument},
		"exists":         {err: wrap(errdefs.ErrAlreadyExists), want: codes.AlreadyExists},
		"precondition":   {err: wrap(errdefs.ErrFailedPrecondition), want: codes.FailedPrecondition},
		"unavailable":    {err: wrap(errdefs.ErrUnavailable), want: codes.Unavailable},
		"exhausted":      {err: wrap(errdefs.ErrResourceExhausted), want: codes.ResourceExhausted},
		"not built":      {err: wrap(errdefs.ErrNotImplemented), want: codes.Unimplemented},
		"denied":         {err: wrap(errdefs.ErrPermissionDenied), want: codes.PermissionDenied},
		"credentials":    {err: wrap(errdefs.ErrUnauthenticated), want: codes.Unauthenticated},
		"lagged":         {err: wrap(errdefs.ErrOutOfRange), want: codes.OutOfRange},
		"lost":           {err: wrap(errdefs.ErrDataLoss), want: codes.DataLoss},
		"timed out":      {err: wrap(context.DeadlineExceeded), want: codes.DeadlineExceeded},
		"cancelled":      {err: wrap(context.Canceled), want: codes.Canceled},
		"I/O timed out":  {err: wrap(os.ErrDeadlineExceeded), want: codes.DeadlineExceeded},
		"disk full":      {err: wrap(&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}), want: codes.ResourceExhausted},
		"no class":       {err: wrap(errors.New("rubbish")), want: codes.Internal},
		"client gone":    {ctx: cancelled, err: wrap(errors.New("rubbish")), want: codes.Canceled},
		"failed to undo": {err: errors.Join(wrap(errdefs.ErrInvalidArgument), fmt.Errorf("undo: %w", errdefs.ErrNotFound)), want: codes.InvalidArgument},
		"of a shim":      {err: fmt.Errorf("%w: %w", errdefs.ErrUnavailable, status.Error(codes.NotFound, "x")), want: codes.Unavailable},
		"of gRPC":        {err: wrap(status.Error(codes.Aborted, "x")), want: codes.Aborted},
	} {
		ctx := tc.ctx
		if ctx == nil {
			ctx = context.Background()
		}
		if got := status.Code(grpcError(ctx, tc.err)); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

func TestErrorText(t *testing.T) {
	err := grpcError(context.Background(), errors.Join(errors.New("first"), errors.New("second\xff"+strings.Repeat("é", 10000))))
	text := status.Convert(err).Message()
	if !strings.HasPrefix(text, "first; second�é") || len(text) > maxErrorText+len("…") {
		t.Errorf("got %d bytes: %.60q…", len(text), text)
	}
	err = grpcError(context.Background(), fmt.Errorf("ask the shim: %w", status.Error(codes.NotFound, "no such task")))
	if got := status.Convert(err).Message(); got != "ask the shim: no such task" {
		t.Errorf("got %q", got)
	}
}
