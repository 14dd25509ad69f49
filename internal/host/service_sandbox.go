package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// sandbox is one sandbox. Lock order: op, then mu.
type sandbox struct {
	host *Host
	op   chan struct{}

	mu    sync.Mutex
	rec   sandboxRecord
	pidfd *os.File
	gone  bool
	ended chan struct{}
}

func (h *Host) newSandbox(rec sandboxRecord) *sandbox {
	return &sandbox{host: h, op: make(chan struct{}, 1), rec: rec, ended: make(chan struct{})}
}

func (h *Host) sandbox(id string) (*sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.sandboxes[id]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
}

func (s *sandbox) update(f func(*sandboxRecord)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.rec)
	if s.gone {
		return
	}
	if err := save(filepath.Join(s.rec.Spec.Dir, "sandbox.json"), &s.rec); err != nil {
		s.host.log.Error("sandbox record not written", "sandbox", s.rec.Spec.ID, "err", err)
	}
}

func (s *sandbox) record() sandboxRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

func (s *sandbox) keptName() string { return "s/" + s.rec.Spec.ID + "/pidfd" }

// exited is told of the holder's end.
func (s *sandbox) exited(e proc.Exit) {
	s.update(func(r *sandboxRecord) {
		if r.Exit == nil {
			r.Exit = &e
			close(s.ended)
		}
	})
}

// lock takes op.
func (s *sandbox) lock(ctx context.Context) (unlock func(), err error) {
	id := s.record().Spec.ID
	select {
	case s.op <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another call on sandbox %s: %w", id, ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		<-s.op
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return func() { <-s.op }, nil
}

func (s *sandbox) start(ctx context.Context) (sandboxRecord, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return sandboxRecord{}, err
	}
	defer unlock()
	rec := s.record()
	switch {
	case rec.Exit != nil: // the caller may have given the start up
		return rec, fmt.Errorf("sandbox %s was stopped: %w", rec.Spec.ID, errdefs.ErrFailedPrecondition)
	case rec.Phase == phaseStarted:
		return rec, fmt.Errorf("sandbox %s was started already: %w", rec.Spec.ID, errdefs.ErrFailedPrecondition)
	}
	s.update(func(r *sandboxRecord) { r.Phase = phaseStarting })
	st, err := s.host.backend.StartSandbox(ctx, &s.rec.Spec, s.exited)
	if err != nil {
		s.update(func(r *sandboxRecord) { r.Phase = phaseCreated })
		return rec, err
	}
	s.host.store.Put(s.keptName(), st.Pidfd)
	s.mu.Lock()
	s.pidfd = st.Pidfd
	s.mu.Unlock()
	s.update(func(r *sandboxRecord) { r.Phase, r.Holder, r.CreatedAt = phaseStarted, st.Process, time.Now() })
	return s.record(), nil
}

// stop ends the sandbox's processes; op is held.
func (s *sandbox) stop(ctx context.Context) error {
	rec := s.record()
	if err := s.host.backend.StopSandbox(ctx, &rec.Spec, rec.Holder); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", rec.Spec.ID, err)
	}
	if rec.Holder.Pid != 0 {
		select {
		case <-s.ended:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of sandbox %s: %w", rec.Spec.ID, ctx.Err())
		}
	}
	s.exited(proc.Exit{At: time.Now()})
	return nil
}

func (h *Host) recoverSandbox(ctx context.Context, id string, held map[string]*os.File) error {
	var rec sandboxRecord
	err := load(filepath.Join(h.sandboxDir(id), "sandbox.json"), &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return os.RemoveAll(h.sandboxDir(id))
	}
	if err != nil {
		return err
	}
	s := h.newSandbox(rec)
	h.sandboxes[id] = s
	pidfd := take(held, s.keptName())
	switch {
	case rec.Exit != nil:
		s.pidfd = pidfd
		close(s.ended)
	case rec.Holder.Pid != 0:
		s.pidfd = h.backend.Watch(&backend.TaskSpec{ID: id}, rec.Holder, pidfd, s.exited)
		h.store.Put(s.keptName(), s.pidfd)
	case rec.Phase == phaseStarting:
		if err := h.backend.StopSandbox(ctx, &rec.Spec, rec.Holder); err != nil {
			return fmt.Errorf("end what a start of sandbox %s left: %w", id, err)
		}
		s.update(func(r *sandboxRecord) { r.Phase = phaseCreated })
	}
	return nil
}

// sandboxService is containerd's Sandbox v1 API.
type sandboxService struct{ h *Host }

func (s sandboxService) CreateSandbox(_ context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	if err := checkID("sandbox", r.SandboxID); err != nil {
		return nil, err
	}
	spec := backend.SandboxSpec{ID: r.SandboxID, Bundle: r.BundlePath, Dir: s.h.sandboxDir(r.SandboxID), NetNS: r.NetnsPath, Annotations: r.Annotations}
	var o hostv1.SandboxOptions
	// Options of other types (a stock containerd sends the pod's config) say
	// nothing that this host needs.
	if r.Options != nil && isType(r.Options, &o) {
		if err := proto.Unmarshal(r.Options.Value, &o); err != nil {
			return nil, fmt.Errorf("sandbox %s: options: %w: %w", r.SandboxID, err, errdefs.ErrInvalidArgument)
		}
		spec.SharePID, spec.UserNamespace, spec.CgroupPath = o.SharePid, o.UserNamespace, o.CgroupPath
		spec.Hostname, spec.Sysctls = o.Hostname, o.Sysctls
		spec.CPUQuota, spec.CPUPeriod, spec.MemoryLimit = o.CpuQuota, o.CpuPeriod, o.MemoryLimit
		for ns, wanted := range map[string]bool{"network": o.HostNetwork, "pid": o.HostPid, "ipc": o.HostIpc} {
			if wanted {
				spec.NodeNamespaces = append(spec.NodeNamespaces, ns)
			}
		}
		slices.Sort(spec.NodeNamespaces)
		if o.Extra != nil {
			spec.Extra = o.Extra.Value
		}
	}
	sb := s.h.newSandbox(sandboxRecord{Spec: spec, Phase: phaseCreated, CreatedAt: time.Now()})
	s.h.mu.Lock()
	if s.h.sandboxes[spec.ID] != nil {
		s.h.mu.Unlock()
		return nil, fmt.Errorf("sandbox %q: %w", spec.ID, errdefs.ErrAlreadyExists)
	}
	s.h.sandboxes[spec.ID] = sb
	s.h.mu.Unlock()
	err := os.MkdirAll(spec.Dir, 0o700)
	if err == nil {
		err = save(filepath.Join(spec.Dir, "sandbox.json"), &sb.rec)
	}
	if err != nil {
		s.h.mu.Lock()
		delete(s.h.sandboxes, spec.ID)
		s.h.mu.Unlock()
		return nil, fmt.Errorf("create sandbox %s: %w", spec.ID, errors.Join(err, os.RemoveAll(spec.Dir)))
	}
	return &sandboxapi.CreateSandboxResponse{}, nil
}

func (s sandboxService) StartSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	sb, err := s.h.sandbox(r.SandboxID)
	if err != nil {
		return nil, err
	}
	rec, err := sb.start(ctx)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.StartSandboxResponse{Pid: uint32(rec.Holder.Pid), CreatedAt: timestamppb.New(rec.CreatedAt)}, nil
}

func (s sandboxService) Platform(context.Context, *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}}, nil
}

func (s sandboxService) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	sb, err := s.h.sandbox(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.TimeoutSecs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutSecs)*time.Second)
		defer cancel()
	}
	unlock, err := sb.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return &sandboxapi.StopSandboxResponse{}, sb.stop(ctx)
}

func (s sandboxService) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	sb, err := s.h.sandbox(r.SandboxID)
	if err != nil {
		return nil, err
	}
	select {
	case <-sb.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	e := sb.record().Exit
	return &sandboxapi.WaitSandboxResponse{ExitStatus: uint32(e.Status), ExitedAt: timestamppb.New(e.At)}, nil
}

// containerd's words for the state of a sandbox.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

func (s sandboxService) SandboxStatus(_ context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	sb, err := s.h.sandbox(r.SandboxID)
	if err != nil {
		return nil, err
	}
	rec := sb.record()
	resp := &sandboxapi.SandboxStatusResponse{SandboxID: r.SandboxID, Pid: uint32(rec.Holder.Pid), State: sandboxNotReady, CreatedAt: timestamppb.New(rec.CreatedAt)}
	switch {
	case rec.Exit != nil:
		resp.ExitedAt = timestamppb.New(rec.Exit.At)
	case rec.Phase == phaseStarted:
		resp.State = sandboxReady
	}
	if r.Verbose {
		if b, err := json.Marshal(&rec.Spec); err == nil {
			resp.Info = map[string]string{"spec": string(b)}
		}
	}
	return resp, nil
}

func (s sandboxService) PingSandbox(_ context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	if _, err := s.h.sandbox(r.SandboxID); err != nil {
		return nil, err
	}
	return &sandboxapi.PingResponse{}, nil
}

// ShutdownSandbox forgets the sandbox; the process serves others and stays.
func (s sandboxService) ShutdownSandbox(ctx context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	sb, err := s.h.sandbox(r.SandboxID)
	if errdefs.IsNotFound(err) {
		return &sandboxapi.ShutdownSandboxResponse{}, nil
	}
	unlock, err := sb.lock(ctx)
	if errdefs.IsNotFound(err) { // another call was quicker
		return &sandboxapi.ShutdownSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := sb.stop(ctx); err != nil {
		return nil, err
	}
	return &sandboxapi.ShutdownSandboxResponse{}, sb.forget()
}

// forget removes what is left of a stopped sandbox; op is held.
func (s *sandbox) forget() error {
	s.mu.Lock()
	s.gone = true
	if s.pidfd != nil {
		s.pidfd.Close()
		s.pidfd = nil
	}
	s.mu.Unlock()
	id := s.rec.Spec.ID
	s.host.store.Drop(s.keptName())
	err := os.RemoveAll(s.rec.Spec.Dir)
	s.host.mu.Lock()
	delete(s.host.sandboxes, id)
	s.host.mu.Unlock()
	if err != nil {
		return fmt.Errorf("forget sandbox %s: %w", id, err)
	}
	return nil
}

func (s sandboxService) SandboxMetrics(context.Context, *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{Timestamp: timestamppb.Now()}}, nil
}

func (s sandboxService) UpdateSandbox(context.Context, *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	return nil, fmt.Errorf("update a sandbox: %w", errdefs.ErrNotImplemented)
}
