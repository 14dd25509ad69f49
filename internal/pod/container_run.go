package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/oci"
	"cloister.dev/internal/shim"
)

// StartContainer runs a created container.
func (s *Service) StartContainer(ctx context.Context, id string) error {
	c, err := s.lockedContainer(ctx, id)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	if p := c.phase(); p != ready {
		return fmt.Errorf("container %.13s is %s, only a created one can be started: %w", c.record().ID, p.containerState(), errdefs.ErrFailedPrecondition)
	}
	sb, err := s.index.sandbox(c.record().SandboxID)
	if err != nil {
		return err
	}
	if sb.get().State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("pod sandbox %.13s of container %.13s is not ready: %w", c.record().SandboxID, c.record().ID, errdefs.ErrFailedPrecondition)
	}
	if err := sb.usable(ctx); err != nil {
		return err
	}
	// A start that the client gave up on is not undone: it either completes
	// or fails, and the container's status tells which.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTime)
	defer cancel()
	return s.startContainer(ctx, sb, c)
}

// lockedContainer finds a container and takes its operation lock.
func (s *Service) lockedContainer(ctx context.Context, id string) (*container, error) {
	c, err := s.index.container(id)
	if err != nil {
		return nil, err
	}
	return c, c.op.lock(ctx)
}

func (s *Service) startContainer(ctx context.Context, sb *sandbox, c *container) error {
	if c.record().LogPath != "" {
		if err := os.MkdirAll(filepath.Dir(c.record().LogPath), 0o755); err != nil {
			return fmt.Errorf("make the log folder: %w", err)
		}
	}
	cfg := c.record().Config
	if s.o.NRI.Active() {
		if err := s.o.NRI.StartContainer(ctx, s.describePod(sb), s.describeContainer(c, nil)); err != nil {
			return errors.Join(err, s.noteFailedStart(c, err))
		}
	}
	started := time.Now() // before the process, so that its end is never before its start
	request := shim.TaskRequest{
		Bundle: c.record().Bundle, Terminal: cfg.Tty, Stdin: cfg.Stdin, StdinOnce: cfg.StdinOnce,
		LogPath: c.record().LogPath, LogMaxLine: s.o.LogMaxLine,
		IOUid: rootOf(sb.record().UIDs), IOGid: rootOf(sb.record().GIDs),
		TargetTask: cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId(),
	}
	var pid uint32
	err := timed(s.o.Observer.Shim, "start container", func() (err error) {
		pid, err = c.task(s).Start(ctx, request)
		return err
	})
	if err != nil {
		c.onShim.Store(true) // where what was made of it could not be removed
		return errors.Join(fmt.Errorf("start container %q: %w", cfg.Metadata.Name, err), s.noteFailedStart(c, err))
	}
	if err := s.noteContainer(c, func(r *containerRecord) { r.Phase, r.Pid, r.StartedAt = running, pid, started }); err != nil {
		// Nobody would watch a container that runs and counts as created.
		c.onShim.Store(true)
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), shimTime)
		defer cancel()
		return errors.Join(err, c.task(s).Discard(clean))
	}
	s.emit(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, c.record().ID, c.record().SandboxID)
	if s.o.NRI.Active() {
		s.tell("PostStartContainer", c.record().ID, s.o.NRI.PostStart(ctx, s.describePod(sb), s.describeContainer(c, nil)))
	}
	s.watch(c)
	return nil
}

// startErrorCode is the exit code of a container whose process never came to
// be, as containerd and docker report it.
const startErrorCode = 128

func (s *Service) noteFailedStart(c *container, cause error) error {
	err := s.changeContainer(c, func(r *containerRecord) {
		r.Phase, r.ExitCode, r.Reason, r.Message = exited, startErrorCode, "StartError", cause.Error()
		r.StartedAt, r.FinishedAt = time.Unix(0, 0), time.Now()
	})
	if err != nil {
		return err
	}
	s.tellEnd(c)
	c.ended.pass()
	c.deleted.pass()
	s.emit(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, c.record().ID, c.record().SandboxID)
	return nil
}

// watch waits for the container's end and notes it. It is called once for
// each running container, at its start or by the recovery.
func (s *Service) watch(c *container) {
	s.work.Go(func() {
		for pause := 50 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
			exit, err := c.task(s).Wait(s.ctx)
			if s.ctx.Err() != nil {
				return
			}
			if errdefs.IsNotFound(err) {
				exit, err = shim.Exit{Status: 255, At: time.Now(), Unknown: true}, nil
			}
			if err == nil {
				err = s.noteExit(c, exit)
			}
			if err == nil {
				break
			}
			s.log.Warn("cannot learn of a container's end, trying again", "container", c.get().ID, "in", pause, "err", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(pause):
			}
		}
		s.deleteTask(c)
	})
}

func (s *Service) noteExit(c *container, e shim.Exit) error {
	err := s.changeContainer(c, func(r *containerRecord) {
		r.Phase, r.Pid, r.ExitCode, r.FinishedAt = exited, 0, int32(e.Status), e.At
		switch {
		case e.Unknown:
			r.Reason, r.Message = "Unknown", "the container ended while neither its shim nor the keeper was there to learn its status"
		case e.OOM:
			r.Reason = "OOMKilled"
		case e.Status == 0:
			r.Reason = "Completed"
		default:
			r.Reason, r.Message = "Error", e.Reason
		}
		if r.FinishedAt.IsZero() || r.FinishedAt.Unix() <= 0 {
			r.FinishedAt = time.Now()
		}
	})
	if err != nil {
		return err
	}
	s.tellEnd(c)
	c.ended.pass()
	v := c.get()
	s.log.Info("container ended", "container", v.ID, "status", v.ExitCode, "reason", v.Reason)
	s.emit(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, v.ID, v.SandboxID)
	return nil
}

// deleteTask takes the ended container off its shim, as soon as it has ended,
// so that its cgroup goes.
func (s *Service) deleteTask(c *container) {
	defer c.deleted.pass()
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	if err := c.task(s).Delete(ctx); err != nil {
		s.keptOnShim(c, err)
	}
}

// keptOnShim notes that a container is on its shim still; its removal tries
// again.
func (s *Service) keptOnShim(c *container, err error) {
	c.onShim.Store(true)
	s.log.Warn("delete an ended container on its shim", "container", c.record().ID, "err", err)
}

// killTime bounds the wait for a container's end after SIGKILL.
const killTime = 2 * time.Minute

// StopContainer sends the container's stop signal, and SIGKILL after the
// timeout. An absent or ended container is success. A second call with a
// shorter timeout shortens the wait.
func (s *Service) StopContainer(ctx context.Context, id string, timeout time.Duration) error {
	c, err := s.index.container(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.stopContainer(ctx, c, timeout)
}

func (s *Service) stopContainer(ctx context.Context, c *container, timeout time.Duration) error {
	// A start on its way must first tell whether there is anything to stop.
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	p := c.phase()
	if p == ready {
		// Never started: from now on it cannot be.
		err := s.changeContainer(c, func(r *containerRecord) {
			r.Phase, r.ExitCode, r.Reason, r.FinishedAt = exited, 0, "Completed", time.Now()
		})
		if err == nil {
			c.ended.pass()
			c.deleted.pass()
		}
		c.op.unlock()
		return err
	}
	c.op.unlock()
	if p != running {
		return nil
	}
	t := c.task(s)
	if timeout > 0 {
		signal, err := oci.ParseSignal(c.record().Signal)
		if err != nil {
			return err
		}
		if err := t.Kill(ctx, signal, false); err != nil {
			return fmt.Errorf("signal container %.13s: %w", c.record().ID, err)
		}
		wait, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		select {
		case <-c.ended.passed():
			return nil
		case <-wait.Done():
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for container %.13s to stop: %w", c.record().ID, ctx.Err())
		}
	}
	if err := t.Kill(ctx, syscall.SIGKILL, true); err != nil {
		return fmt.Errorf("kill container %.13s: %w", c.record().ID, err)
	}
	wait, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	select {
	case <-c.ended.passed():
		return nil
	case <-wait.Done():
		return fmt.Errorf("container %.13s does not end after SIGKILL (a process in uninterruptible sleep?): %w", c.record().ID, wait.Err())
	}
}

// RemoveContainer removes a container, killing it when it runs. It may be
// repeated; an absent container is success.
func (s *Service) RemoveContainer(ctx context.Context, id string) error {
	c, err := s.index.container(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.stopContainer(ctx, c, 0); err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	if _, err := s.index.container(c.record().ID); errdefs.IsNotFound(err) {
		return nil
	}
	select {
	case <-c.deleted.passed():
	case <-ctx.Done():
		return fmt.Errorf("wait for the shim to let go of container %.13s: %w", c.record().ID, ctx.Err())
	}
	if c.onShim.Load() {
		if err := c.task(s).Discard(ctx); err != nil {
			return fmt.Errorf("delete container %.13s on its shim: %w", c.record().ID, err)
		}
		c.onShim.Store(false)
	}
	s.tellRemoval(ctx, c)
	if err := s.changeContainer(c, func(r *containerRecord) { r.Phase = removing }); err != nil {
		return err
	}
	if err := s.releaseFiles(ctx, c); err != nil {
		return err
	}
	return s.dropContainer(c)
}

func (s *Service) dropContainer(c *container) error {
	if err := s.deleteContainer(c); err != nil {
		return err
	}
	v := c.get()
	s.emit(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, v.ID, v.SandboxID)
	return nil
}
