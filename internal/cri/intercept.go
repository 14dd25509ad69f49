package cri

import (
	"context"
	"fmt"
	"log/slog"
	"path"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// changing are the calls that change something, and so are logged. ExecSync is
// not one: probes make thousands of them.
var changing = map[string]bool{
	"RunPodSandbox": true, "StopPodSandbox": true, "RemovePodSandbox": true, "UpdatePodSandboxResources": true,
	"CreateContainer": true, "StartContainer": true, "StopContainer": true, "RemoveContainer": true,
	"UpdateContainerResources": true, "ReopenContainerLog": true, "Exec": true, "Attach": true, "PortForward": true,
	"UpdateRuntimeConfig": true, "CheckpointContainer": true, "CheckpointPod": true, "RestorePod": true,
	"PullImage": true, "RemoveImage": true,
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	call := path.Base(info.FullMethod)
	start := time.Now()
	defer func() { s.note(ctx, call, start, req, resp, err) }()
	defer func() { err = grpcError(ctx, err) }()
	defer s.recovered(call, &err)
	if err := check(req); err != nil {
		return nil, err
	}
	return handle(ctx, req)
}

func (s *Server) streaming(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	call := path.Base(info.FullMethod)
	start := time.Now()
	defer func() { s.note(ss.Context(), call, start, nil, nil, err) }()
	defer func() { err = grpcError(ss.Context(), err) }()
	defer s.recovered(call, &err)
	return handle(srv, checkedStream{ss})
}

// checkedStream checks the request of a streaming call.
type checkedStream struct{ grpc.ServerStream }

func (c checkedStream) RecvMsg(m any) error {
	if err := c.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return check(m)
}

// recovered turns a panic into an error, so that one bad call does not take
// the daemon with it.
func (s *Server) recovered(call string, err *error) {
	if p := recover(); p != nil {
		s.log.Error("panic in a CRI call", "call", call, "panic", p, "stack", string(debug.Stack()))
		*err = fmt.Errorf("%s: internal error, the daemon's log says more: %w", call, errdefs.ErrInternal)
	}
}

// note writes the line of a call. It names what the call was about and nothing
// else of the request: commands, environment and credentials stay out.
func (s *Server) note(ctx context.Context, call string, start time.Time, req, resp any, err error) {
	if s.observeCall != nil {
		s.observeCall(call, status.Code(err).String(), time.Since(start))
	}
	level := slog.LevelDebug
	switch {
	case changing[call] && err != nil:
		level = slog.LevelWarn
	case changing[call]:
		level = slog.LevelInfo
	}
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := append([]slog.Attr{slog.Duration("took", time.Since(start))}, subject(req)...)
	if err == nil {
		attrs = append(attrs, subject(resp)...)
	} else {
		st, _ := status.FromError(err)
		attrs = append(attrs, slog.String("code", st.Code().String()), slog.String("error", st.Message()))
	}
	s.log.LogAttrs(ctx, level, call, attrs...)
}

// subject names what a request or response is about.
func subject(m any) []slog.Attr {
	var attrs []slog.Attr
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, shorten(value)))
		}
	}
	if r, ok := m.(interface{ GetPodSandboxId() string }); ok {
		add("pod", r.GetPodSandboxId())
	}
	if r, ok := m.(interface{ GetContainerId() string }); ok {
		add("container", r.GetContainerId())
	}
	if r, ok := m.(interface{ GetImage() *runtimeapi.ImageSpec }); ok {
		add("image", r.GetImage().GetImage())
	}
	if r, ok := m.(interface{ GetImageRef() string }); ok {
		add("image_id", r.GetImageRef())
	}
	switch r := m.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		add("name", r.GetConfig().GetMetadata().GetNamespace()+"/"+r.GetConfig().GetMetadata().GetName())
		add("handler", r.GetRuntimeHandler())
	case *runtimeapi.CreateContainerRequest:
		add("name", r.GetConfig().GetMetadata().GetName())
		add("image", r.GetConfig().GetImage().GetImage())
	}
	return attrs
}

// shorten bounds what a hostile id or name takes in the log.
func shorten(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
