package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/oci"
	"cloister.dev/internal/shim"
)

const (
	// execSyncMax is how much output of an ExecSync is kept, in bytes of both
	// streams: with the message around it, kubelet's client takes 16 MiB.
	execSyncMax = 16<<20 - 4096
	// drainTime bounds the wait for output after a process ended whose client
	// streams: a child of it may hold the stream open for ever.
	drainTime = 10 * time.Second
	// shimTime bounds calls that clean up after an exec.
	shimTime = 30 * time.Second
)

func (s *Service) runningContainer(id string) (*container, error) {
	c, err := s.index.container(id)
	if err != nil {
		return nil, err
	}
	if p := c.phase(); p != running {
		return nil, fmt.Errorf("container %.13s is %s, it must run: %w", c.record().ID, p.containerState(), errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// started is one process started in a container, with its streams.
type started struct {
	exec  shim.Exec
	fifos *fifos
	log   *slog.Logger
}

// startExec starts cmd in the container. The caller ends it with finish.
func (s *Service) startExec(ctx context.Context, c *container, cmd []string, in, out, errs, tty bool) (_ *started, err error) {
	spec, err := readSpec(c.record().Bundle)
	if err != nil {
		return nil, err
	}
	p, err := oci.Exec(spec, filepath.Join(c.record().Bundle, "rootfs"), cmd, tty)
	if err != nil {
		return nil, err
	}
	id := newID()[:16]
	f, err := newFifos(filepath.Join(c.record().Bundle, "exec", id), in, out, errs)
	if err != nil {
		return nil, err
	}
	st := &started{exec: c.task(s).Exec(id), fifos: f, log: s.log}
	fin, fout, ferr := f.paths()
	if err := st.exec.Start(ctx, p, fin, fout, ferr); err != nil {
		st.finish(ctx)
		return nil, fmt.Errorf("exec in container %q: %w", c.record().Config.Metadata.Name, err)
	}
	f.opened()
	return st, nil
}

// finish forgets the process, killing it when it still runs.
func (st *started) finish(ctx context.Context) {
	st.fifos.close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shimTime)
	defer cancel()
	if st.exec.Delete(ctx) == nil {
		return
	}
	// It runs still, or is being started: the client went away or its time is
	// over.
	err := st.exec.Kill(ctx, syscall.SIGKILL)
	if err == nil {
		_, err = st.exec.Wait(ctx)
	}
	if e := st.exec.Delete(ctx); e == nil { // which also tells of one that could not be killed
		return
	} else if err == nil {
		err = e
	}
	if !errdefs.IsNotFound(err) {
		st.log.Warn("a process of an exec was left", "container", st.exec.ID, "exec", st.exec.ExecID, "err", err)
	}
}

// ExecSync runs cmd in the container and gives its output, of which what is
// beyond 16 MiB is dropped. When the timeout (0: none) ends first, the process is killed.
func (s *Service) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*runtimeapi.ExecSyncResponse, error) {
	c, err := s.runningContainer(id)
	if err != nil {
		return nil, err
	}
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	st, err := s.startExec(ctx, c, cmd, false, true, true, false)
	if err != nil {
		return nil, err
	}
	defer st.finish(ctx)
	var room atomic.Int64
	room.Store(execSyncMax)
	stdout, stderr := &limited{room: &room}, &limited{room: &room}
	exit, err := s.runToEnd(ctx, st, stdout, stderr, s.o.DrainExecSync)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && timeout > 0 {
			err = fmt.Errorf("command %.100q timed out after %v: %w", cmd, timeout, err)
		}
		return nil, err
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.data, Stderr: stderr.data, ExitCode: int32(exit.Status)}, nil
}

// runToEnd passes the outputs on until the process has ended and they are
// delivered, for which they have the time drain; 0: as long as ctx.
func (s *Service) runToEnd(ctx context.Context, st *started, stdout, stderr io.Writer, drain time.Duration) (shim.Exit, error) {
	copyCtx, stopCopy := context.WithCancel(ctx)
	defer stopCopy()
	var copied sync.WaitGroup
	var copyErr error
	copied.Go(func() { copyErr = st.fifos.copyOut(copyCtx, stdout, stderr) })
	exit, err := st.exec.Wait(ctx)
	if err != nil {
		stopCopy()
		copied.Wait()
		return exit, err
	}
	if drain <= 0 {
		copied.Wait()
		return exit, copyErr
	}
	timer := time.AfterFunc(drain, stopCopy)
	copied.Wait()
	if !timer.Stop() {
		s.log.Warn("output of an ended exec stayed open, cut off", "container", st.exec.ID, "after", drain)
		return exit, nil
	}
	return exit, copyErr
}

// Exec runs cmd in the container with the client's streams.
func (s *Service) Exec(ctx context.Context, id string, cmd []string, st Streams, tty bool, resize <-chan Size) (int32, error) {
	c, err := s.runningContainer(id)
	if err != nil {
		return 0, err
	}
	p, err := s.startExec(ctx, c, cmd, st.In != nil, st.Out != nil, st.Err != nil && !tty, tty)
	if err != nil {
		return 0, err
	}
	defer p.finish(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go followSize(ctx, p.exec, resize)
	go p.feed(ctx, st.In)
	exit, err := s.runToEnd(ctx, p, st.Out, st.Err, drainTime)
	return int32(exit.Status), err
}

// Attach connects the client's streams to those of the container.
func (s *Service) Attach(ctx context.Context, id string, st Streams, tty bool, resize <-chan Size) error {
	c, err := s.runningContainer(id)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.record().Bundle, "attach", newID()[:16])
	f, err := newFifos(dir, st.In != nil && c.record().Config.Stdin, st.Out != nil, st.Err != nil && !c.record().Config.Tty)
	if err != nil {
		return err
	}
	defer f.close()
	t := c.task(s)
	fin, fout, ferr := f.paths()
	if err := t.Attach(ctx, fin, fout, ferr); err != nil {
		return fmt.Errorf("attach to container %q: %w", c.record().Config.Metadata.Name, err)
	}
	f.opened()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if tty {
		go followSize(ctx, t.Exec(""), resize)
	}
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		if f.in != nil {
			f.feed(ctx, st.In)
		}
	}()
	if st.Out == nil && st.Err == nil {
		// Only input: the session lasts as long as the client or the container.
		select {
		case <-fed:
		case <-c.ended.passed():
		case <-ctx.Done():
		}
		return nil
	}
	return f.copyOut(ctx, st.Out, st.Err)
}

// feed passes the client's input on; its end closes the process's input. It
// ends with the client's stream, which the stream server closes.
func (st *started) feed(ctx context.Context, from io.Reader) {
	if st.fifos.in == nil {
		return
	}
	st.fifos.feed(ctx, from)
	// With nobody waiting for it, an unanswered call only leaves the input open.
	_ = st.exec.CloseStdin(ctx)
}

func followSize(ctx context.Context, e shim.Exec, resize <-chan Size) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-resize:
			if !ok {
				return
			}
			if size.Width > 0 && size.Height > 0 {
				_ = e.Resize(ctx, size.Width, size.Height) // the process may have ended
			}
		}
	}
}
