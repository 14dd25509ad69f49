package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// place is what a Process of a task carries: its exec id and its pid in the
// guest.
type place struct {
	Exec string `json:"exec,omitempty"`
	Pid  uint32 `json:"pid"`
}

func placeOf(p backend.Process) place {
	var pl place
	_ = json.Unmarshal([]byte(p.Place), &pl) // ours; a task without a process has none
	return pl
}

// key is a short name of a task, or of an exec in it, for ports and folders.
func key(task, exec string) string {
	sum := sha256.Sum256([]byte(task + "\x00" + exec))
	return hex.EncodeToString(sum[:8])
}

// process gives the Process of something that runs in the machine. Its pid is
// QEMU's: the guest's means nothing outside, and could be taken for another.
func (s *sandbox) process(exec string, pid uint32) (backend.Process, error) {
	b, err := json.Marshal(place{Exec: exec, Pid: pid})
	if err != nil {
		return backend.Process{}, err
	}
	state := s.record().Machine
	return backend.Process{Pid: state.Pid, Start: state.Start, Place: string(b)}, nil
}

// Create is part of backend.Backend.
func (b *Backend) Create(ctx context.Context, t *backend.TaskSpec, st backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
	return b.launch(ctx, t, st, false, exited)
}

// Start is part of backend.Backend.
func (b *Backend) Start(ctx context.Context, t *backend.TaskSpec, st backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
	if t.RunOnStart {
		return b.launch(ctx, t, st, true, exited)
	}
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return backend.Started{}, err
	}
	return backend.Started{}, s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.Start(ctx, &guestv1.TaskRequest{Task: t.ID})
		return err
	})
}

// launch makes a container in the machine.
func (b *Backend) launch(ctx context.Context, t *backend.TaskSpec, streams backend.Streams, run bool, exited func(proc.Exit)) (st backend.Started, err error) {
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return st, err
	}
	defer func() {
		if err != nil {
			if st.Console != nil {
				st.Console.Close()
				st.Console = nil
			}
			err = errors.Join(err, b.Delete(context.WithoutCancel(ctx), t))
		}
	}()
	r, err := s.shareTask(ctx, t)
	if err != nil {
		return st, err
	}
	ports, console, err := s.plug(ctx, key(t.ID, ""), streams)
	if err != nil {
		return st, err
	}
	st.Console, r.Streams, r.Run = console, ports, run
	var resp *guestv1.LaunchResponse
	if err := s.call(ctx, func(ctx context.Context, g guestv1.GuestService) (err error) {
		resp, err = g.Launch(ctx, r)
		return err
	}); err != nil {
		return st, err
	}
	if st.Process, err = s.process("", resp.Pid); err != nil {
		return st, err
	}
	p := st.Process
	b.workers.Go(func() { b.await(t, p, exited) })
	return st, nil
}

// Exec is part of backend.Backend.
func (b *Backend) Exec(ctx context.Context, t *backend.TaskSpec, id string, process []byte, streams backend.Streams, exited func(proc.Exit)) (st backend.Started, err error) {
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return st, err
	}
	ports, console, err := s.plug(ctx, key(t.ID, id), streams)
	if err != nil {
		return st, err
	}
	var resp *guestv1.LaunchResponse
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) (err error) {
		resp, err = g.Exec(ctx, &guestv1.ExecRequest{Task: t.ID, Exec: id, Process: guestProcess(process), Streams: ports})
		return err
	})
	if err != nil {
		if console != nil {
			console.Close()
		}
		return st, errors.Join(err, s.unplug(context.WithoutCancel(ctx), key(t.ID, id)))
	}
	st.Console = console
	if st.Process, err = s.process(id, resp.Pid); err != nil {
		return st, err
	}
	p := st.Process
	b.workers.Go(func() { b.await(t, p, exited) })
	return st, nil
}

// await waits for the end of a process in the guest and tells it.
func (b *Backend) await(t *backend.TaskSpec, p backend.Process, exited func(proc.Exit)) {
	began := time.Now()
	exec := placeOf(p).Exec
	s, err := b.sandboxOf(b.ctx, t)
	if err != nil {
		if b.ctx.Err() == nil {
			b.log.Error("end of a process is unknown", "task", t.ID, "exec", exec, "err", err)
			exited(proc.UnknownExit())
		}
		return
	}
	var resp *guestv1.WaitResponse
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err = s.call(b.ctx, func(ctx context.Context, g guestv1.GuestService) (err error) {
			resp, err = g.Wait(ctx, &guestv1.ProcessRequest{Task: t.ID, Exec: exec})
			return err
		})
		if b.ctx.Err() != nil {
			return // the next life of this program waits
		}
		if err == nil || errdefs.IsNotFound(err) || ended(s.machine()) {
			break
		}
		b.log.Warn("cannot wait for a process in a guest, trying again", "task", t.ID, "exec", exec, "in", pause, "err", err)
		select {
		case <-time.After(pause):
		case <-b.ctx.Done():
			return
		}
	}
	if exec != "" {
		if err := s.unplug(b.ctx, key(t.ID, exec)); err != nil && !ended(s.machine()) {
			b.log.Warn("ports of an exec not unplugged", "task", t.ID, "exec", exec, "err", err)
		}
	}
	exited(s.exitOf(resp, err, began))
	if exec != "" && err == nil {
		err := s.call(b.ctx, func(ctx context.Context, g guestv1.GuestService) error {
			_, err := g.Forget(ctx, &guestv1.ProcessRequest{Task: t.ID, Exec: exec})
			return err
		})
		if err != nil && !ended(s.machine()) {
			b.log.Warn("exec not forgotten by the guest", "task", t.ID, "exec", exec, "err", err)
		}
	}
}

// killedStatus is the status of what ended with its machine.
const killedStatus = 137

// exitOf turns an answer of the guest into an exit, believing no more of it
// than can be.
func (s *sandbox) exitOf(resp *guestv1.WaitResponse, err error, began time.Time) proc.Exit {
	if m := s.machine(); err != nil && ended(m) {
		reason := "its virtual machine ended"
		if r := m.Exit().Reason; r != "" {
			reason += ": " + r
		}
		return proc.Exit{Status: killedStatus, At: time.Now(), Reason: reason}
	}
	if err != nil || resp.Unknown {
		return proc.UnknownExit()
	}
	e := proc.Exit{Status: int(min(max(resp.Status, 0), 255)), At: time.Unix(0, resp.AtNanos)}
	if now := time.Now(); e.At.Before(began) || e.At.After(now) {
		e.At = now
	}
	return e
}

// Find is part of backend.Backend.
func (b *Backend) Find(ctx context.Context, t *backend.TaskSpec, exited func(proc.Exit)) (st backend.Started, found bool, err error) {
	s, err := b.sandboxOf(ctx, t)
	if errdefs.IsNotFound(err) {
		return st, false, nil
	}
	if err != nil {
		return st, false, err
	}
	var resp *guestv1.PidsResponse
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) (err error) {
		resp, err = g.Pids(ctx, &guestv1.TaskRequest{Task: t.ID})
		return err
	})
	// A terminal's other end was lost, so the container is of no use.
	if err != nil || t.Terminal {
		return st, false, b.Delete(ctx, t)
	}
	var pid uint32
	if len(resp.Pids) > 0 {
		pid = resp.Pids[0]
	}
	if st.Process, err = s.process("", pid); err != nil {
		return st, false, err
	}
	p := st.Process
	b.workers.Go(func() { b.await(t, p, exited) })
	return st, true, nil
}

// Settle is part of backend.Backend.
func (b *Backend) Settle(ctx context.Context, t *backend.TaskSpec, _ backend.Process) (oom bool, err error) {
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return false, ignoreNotFound(err)
	}
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		resp, err := g.Settle(ctx, &guestv1.TaskRequest{Task: t.ID})
		oom = resp.GetOom()
		return err
	})
	if err = ignoreNotFound(err); err == nil {
		// Whoever reads the streams waits for their end, which is the last
		// copy's: the machine's.
		err = s.unplug(ctx, key(t.ID, ""))
	}
	if ended(s.machine()) {
		return false, nil
	}
	return oom, err
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Delete is part of backend.Backend.
func (b *Backend) Delete(ctx context.Context, t *backend.TaskSpec) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return unmountRootfs(t)
		}
		return err
	}
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.Delete(ctx, &guestv1.TaskRequest{Task: t.ID})
		return err
	})
	err = ignoreNotFound(err)
	if err == nil {
		err = s.unplug(ctx, key(t.ID, ""))
	}
	if ended(s.machine()) {
		err = nil // everything in it went with it
	}
	return errors.Join(err, s.unshareTask(ctx, t), unmountRootfs(t))
}

// onTask calls the guest about a task.
func (b *Backend) onTask(ctx context.Context, t *backend.TaskSpec, f func(context.Context, guestv1.GuestService, *guestv1.TaskRequest) error) error {
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return err
	}
	return s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		return f(ctx, g, &guestv1.TaskRequest{Task: t.ID})
	})
}

// Signal is part of backend.Backend.
func (b *Backend) Signal(ctx context.Context, t *backend.TaskSpec, p backend.Process, signal int, all bool) error {
	if signal <= 0 || signal > 64 {
		return fmt.Errorf("signal %d does not exist: %w", signal, errdefs.ErrInvalidArgument)
	}
	err := b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) error {
		_, err := g.Signal(ctx, &guestv1.SignalRequest{Task: r.Task, Exec: placeOf(p).Exec, Signal: int32(signal), All: all})
		return err
	})
	if errors.Is(err, errEnded) {
		return fmt.Errorf("process of task %s: %w", t.ID, errdefs.ErrNotFound)
	}
	return err
}

// Pause is part of backend.Backend.
func (b *Backend) Pause(ctx context.Context, t *backend.TaskSpec) error {
	return b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) error {
		_, err := g.Pause(ctx, r)
		return err
	})
}

// Resume is part of backend.Backend.
func (b *Backend) Resume(ctx context.Context, t *backend.TaskSpec) error {
	return b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) error {
		_, err := g.Resume(ctx, r)
		return err
	})
}

// Update is part of backend.Backend.
func (b *Backend) Update(ctx context.Context, t *backend.TaskSpec, resources []byte) error {
	s, err := b.sandboxOf(ctx, t)
	if err != nil {
		return err
	}
	return s.resize(ctx, t.ID, resources, func() error {
		return s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
			_, err := g.Update(ctx, &guestv1.UpdateRequest{Task: t.ID, Resources: guestResources(resources)})
			return err
		})
	})
}

// maxPids bounds what a guest can claim.
const maxPids = 1 << 16

// Pids is part of backend.Backend. They are those of the guest.
func (b *Backend) Pids(ctx context.Context, t *backend.TaskSpec, _ backend.Process) (pids []int, err error) {
	err = b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) error {
		resp, err := g.Pids(ctx, r)
		for _, p := range resp.GetPids() {
			if len(pids) < maxPids {
				pids = append(pids, int(p))
			}
		}
		return err
	})
	return pids, err
}

// Stats is part of backend.Backend.
func (b *Backend) Stats(ctx context.Context, t *backend.TaskSpec, _ backend.Process) (*anypb.Any, error) {
	var a *anypb.Any
	err := b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) (err error) {
		a, err = g.Stats(ctx, r)
		return err
	})
	if err != nil {
		return nil, err
	}
	return checkedStats(a)
}

// checkedStats gives only what can be read as metrics.
func checkedStats(a *anypb.Any) (*anypb.Any, error) {
	for _, m := range []proto.Message{&v2.Metrics{}, &v1.Metrics{}} {
		name := string(m.ProtoReflect().Descriptor().FullName())
		if a.GetTypeUrl() != name {
			continue
		}
		if err := proto.Unmarshal(a.Value, m); err != nil {
			return nil, fmt.Errorf("metrics from the guest: %w: %w", err, errdefs.ErrDataLoss)
		}
		return &anypb.Any{TypeUrl: name, Value: a.Value}, nil
	}
	return nil, fmt.Errorf("metrics from the guest are of type %.100q: %w", a.GetTypeUrl(), errdefs.ErrDataLoss)
}

// ResizeTerminal is part of backend.TerminalResizer.
func (b *Backend) ResizeTerminal(ctx context.Context, t *backend.TaskSpec, p backend.Process, width, height uint32) error {
	return b.onTask(ctx, t, func(ctx context.Context, g guestv1.GuestService, r *guestv1.TaskRequest) error {
		_, err := g.Resize(ctx, &guestv1.ResizeRequest{Task: r.Task, Exec: placeOf(p).Exec, Width: width, Height: height})
		return err
	})
}

// sandboxInBundle finds the sandbox of a task whose client did not name it.
func sandboxInBundle(bundle string) (string, error) {
	b, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return "", fmt.Errorf("read the bundle: %w", err)
	}
	var spec struct{ Annotations map[string]string }
	if err := json.Unmarshal(b, &spec); err != nil {
		return "", fmt.Errorf("read the bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if id := spec.Annotations["io.kubernetes.cri.sandbox-id"]; id != "" {
		return id, nil
	}
	return "", fmt.Errorf("its sandbox is not named, neither in the request nor by an annotation: %w", errdefs.ErrInvalidArgument)
}
