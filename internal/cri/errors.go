package cri

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxErrorText bounds what an error may say: it travels in an HTTP/2 header,
// and kubelet puts it into an event.
const maxErrorText = 4096

// grpcError gives err the gRPC code of its class. ctx is that of the call.
func grpcError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	return status.Error(errorCode(ctx, err), errorText(err))
}

//nolint:errorlint // Resolve gives one of these values itself
func errorCode(ctx context.Context, err error) codes.Code {
	switch errdefs.Resolve(err) {
	case errdefs.ErrInvalidArgument:
		return codes.InvalidArgument
	case errdefs.ErrNotFound:
		return codes.NotFound
	case errdefs.ErrAlreadyExists:
		return codes.AlreadyExists
	case errdefs.ErrPermissionDenied:
		return codes.PermissionDenied
	case errdefs.ErrResourceExhausted:
		return codes.ResourceExhausted
	case errdefs.ErrFailedPrecondition, errdefs.ErrConflict, errdefs.ErrNotModified:
		return codes.FailedPrecondition
	case errdefs.ErrAborted:
		return codes.Aborted
	case errdefs.ErrOutOfRange:
		return codes.OutOfRange
	case errdefs.ErrNotImplemented:
		return codes.Unimplemented
	case errdefs.ErrInternal:
		return codes.Internal
	case errdefs.ErrUnavailable:
		return codes.Unavailable
	case errdefs.ErrDataLoss:
		return codes.DataLoss
	case errdefs.ErrUnauthenticated:
		return codes.Unauthenticated
	case context.DeadlineExceeded:
		return codes.DeadlineExceeded
	case context.Canceled:
		return codes.Canceled
	}
	// Below our own class, because it may be what a shim answered to us.
	if st, ok := status.FromError(err); ok && st.Code() != codes.Unknown {
		return st.Code()
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		return codes.ResourceExhausted
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(ctx.Err(), context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(ctx.Err(), context.Canceled):
		return codes.Canceled
	}
	return codes.Internal
}

// errorText is err in one line of bounded length, without its gRPC prefix.
func errorText(err error) string {
	text := err.Error()
	var wrapped interface{ GRPCStatus() *status.Status }
	if errors.As(err, &wrapped) {
		// The code is sent beside the text; repeating it helps nobody.
		text = strings.Replace(text, "rpc error: code = "+wrapped.GRPCStatus().Code().String()+" desc = ", "", 1)
	}
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\n", "; "), "�")
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	return text
}
