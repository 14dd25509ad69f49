package pod

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Observer is told how long things took. What is nil is not called.
type Observer struct {
	// Stage is one step of making an object, "pod sandbox" or "container".
	Stage func(object, stage string, took time.Duration)
	// Ready is a pod from the request to its readiness.
	Ready func(took time.Duration)
	// Network is "attach" or "detach".
	Network func(operation string, took time.Duration, err error)
	// Shim is "start sandbox" or "start container".
	Shim func(operation string, took time.Duration, err error)
	// Tracer makes spans of creations and their stages, below the caller's.
	Tracer trace.Tracer
}

// timed tells note how long f took.
func timed(note func(string, time.Duration, error), operation string, f func() error) error {
	if note == nil {
		return f()
	}
	start := time.Now()
	err := f()
	note(operation, time.Since(start), err)
	return err
}

// stages follows a creation through its stages.
type stages struct {
	o      Observer
	object string
	ctx    context.Context // of the creation's span
	whole  trace.Span      // nil: no tracer
	span   trace.Span      // of the stage that is under way
	start  time.Time
	began  time.Time
}

// follow begins with the stage called first. The creation's context is that
// of s, in the trace of the caller.
func (o Observer) follow(ctx, caller context.Context, object, first string) *stages {
	now := time.Now()
	st := &stages{o: o, object: object, ctx: ctx, start: now, began: now}
	if o.Tracer != nil {
		ctx = trace.ContextWithSpanContext(ctx, trace.SpanContextFromContext(caller))
		st.ctx, st.whole = o.Tracer.Start(ctx, "make "+object)
		_, st.span = o.Tracer.Start(st.ctx, first)
	}
	return st
}

// next ends the stage called ended and tells how long it took.
func (st *stages) next(ended, stage string) time.Duration {
	now := time.Now()
	took := now.Sub(st.began)
	st.began = now
	if st.o.Stage != nil {
		st.o.Stage(st.object, ended, took)
	}
	if st.span != nil {
		st.span.End()
		_, st.span = st.o.Tracer.Start(st.ctx, stage)
	}
	return took
}

func (st *stages) end(err error) {
	if err == nil && st.o.Ready != nil && st.object == sandboxObject {
		st.o.Ready(time.Since(st.start))
	}
	if st.whole == nil {
		return
	}
	st.span.End()
	if err != nil {
		st.whole.SetStatus(codes.Error, err.Error())
	}
	st.whole.End()
}

// Counts tells how many pods and containers there are by state.
func (s *Service) Counts() (pods, containers map[string]int) {
	pods, containers = map[string]int{"ready": 0, "notready": 0}, map[string]int{"created": 0, "running": 0, "exited": 0}
	for _, sb := range s.index.allSandboxes() {
		if sb.get().State == runtimeapi.PodSandboxState_SANDBOX_READY {
			pods["ready"]++
		} else {
			pods["notready"]++
		}
	}
	for _, c := range s.Containers() {
		switch c.State {
		case runtimeapi.ContainerState_CONTAINER_CREATED:
			containers["created"]++
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			containers["running"]++
		default:
			containers["exited"]++
		}
	}
	return pods, containers
}

// Working tells which handlers work: 1 or 0 by name, without those whose probe
// is still under way.
func (s *Service) Working() map[string]int {
	all := map[string]int{}
	for _, h := range s.o.Shims.Handlers() {
		ctx, cancel := context.WithTimeout(s.ctx, time.Millisecond)
		f, err := h.Features(ctx)
		cancel()
		switch {
		case err != nil:
		case f.Works:
			all[h.Name] = 1
		default:
			all[h.Name] = 0
		}
	}
	return all
}

// Unwell gives why pods cannot be made; nothing means that they can.
func (s *Service) Unwell(ctx context.Context) []string {
	var reasons []string
	for _, c := range s.conditions(ctx) {
		if !c.Status && (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) {
			reasons = append(reasons, c.Reason+": "+c.Message)
		}
	}
	return reasons
}
