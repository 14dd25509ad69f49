package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// execution is one more process of a task.
type execution struct {
	task *task
	path string // of its record
	op   chan struct{}

	mu    sync.Mutex
	rec   execRecord
	pidfd *os.File
	term  *clientTerminal
	gone  bool
	ended *event // its exit is known and its output delivered, or it never ran
}

const execPrefix = "exec-"

func (t *task) newExec(rec execRecord) *execution {
	return &execution{task: t, path: filepath.Join(t.dir, execPrefix+rec.ID+".json"), rec: rec,
		op: make(chan struct{}, 1), ended: newEvent()}
}

func (x *execution) keptName() string {
	return keptName(x.task.rec.Spec.ID) + "x/" + x.rec.ID + "/"
}

// addExec prepares an exec.
func (t *task) addExec(id string, process json.RawMessage, io clientIO) error {
	if _, err := t.running(); err != nil {
		return err
	}
	x := t.newExec(execRecord{ID: id, Process: process, IO: io, Phase: phaseCreated})
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone {
		return fmt.Errorf("task %s: %w", t.rec.Spec.ID, errdefs.ErrNotFound)
	}
	if t.execs[id] != nil {
		return fmt.Errorf("exec %s of task %s: %w", id, t.rec.Spec.ID, errdefs.ErrAlreadyExists)
	}
	if err := save(x.path, &x.rec); err != nil {
		return err
	}
	t.execs[id] = x
	return nil
}

func (t *task) exec(id string) (*execution, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.execs[id]; x != nil {
		return x, nil
	}
	return nil, fmt.Errorf("exec %s of task %s: %w", id, t.rec.Spec.ID, errdefs.ErrNotFound)
}

func (x *execution) update(f func(*execRecord)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f(&x.rec)
	if x.gone {
		return
	}
	if err := save(x.path, &x.rec); err != nil {
		x.task.host.log.Error("exec record not written", "task", x.task.rec.Spec.ID, "exec", x.rec.ID, "err", err)
	}
}

func (x *execution) record() execRecord {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.rec
}

func (x *execution) start(ctx context.Context) (pid int, err error) {
	select {
	case x.op <- struct{}{}:
		defer func() { <-x.op }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	rec := x.record()
	if _, err := x.task.running(); err != nil {
		return 0, err
	}
	s, err := rec.IO.childStreams(ctx)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	if err := x.claim(); err != nil {
		return 0, err
	}
	st, err := x.task.host.backend.Exec(ctx, &x.task.rec.Spec, rec.ID, rec.Process, s, x.exited)
	x.task.making.Done()
	if err != nil {
		x.update(func(r *execRecord) { r.Phase = phaseCreated })
		x.endUnmade()
		return 0, err
	}
	if err := x.adopt(st); err != nil {
		// It shares its PID namespace with others, or would be dead.
		killed := x.task.host.backend.Signal(context.WithoutCancel(ctx), &x.task.rec.Spec, st.Process, int(unix.SIGKILL), false)
		if errdefs.IsNotFound(killed) {
			killed = nil
		}
		return 0, errors.Join(err, killed)
	}
	if st.Console != nil {
		if err := x.connect(ctx, st.Console); err != nil {
			return 0, err
		}
	}
	return st.Pid, nil
}

// claim notes that the process is about to be made, and keeps the task's folder
// until the caller is done with that. Who opens streams waits for their reader,
// and the exec may be deleted meanwhile.
func (x *execution) claim() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.gone:
		return x.errDeleted()
	case x.rec.Phase != phaseCreated:
		return fmt.Errorf("exec %s was started already: %w", x.rec.ID, errdefs.ErrFailedPrecondition)
	}
	starting := x.rec
	starting.Phase = phaseStarting
	if err := save(x.path, &starting); err != nil {
		return err
	}
	x.rec = starting
	x.task.making.Add(1)
	return nil
}

// adopt notes the process that was made, unless the exec went with its task
// meanwhile.
func (x *execution) adopt(st backend.Started) error {
	x.mu.Lock()
	gone := x.gone
	if !gone {
		x.task.host.store.Put(x.keptName()+"pidfd", st.Pidfd)
		x.pidfd = st.Pidfd
	}
	x.mu.Unlock()
	if gone {
		for _, f := range []*os.File{st.Pidfd, st.Console} {
			if f != nil {
				f.Close()
			}
		}
		return x.errDeleted()
	}
	x.update(func(r *execRecord) { r.Init, r.Phase = st.Process, phaseStarted })
	return nil
}

// connect connects the client with the terminal, which it owns.
func (x *execution) connect(ctx context.Context, console *os.File) error {
	term, err := x.rec.IO.startTerminal(ctx, console)
	if err != nil {
		console.Close()
		return fmt.Errorf("connect the terminal: %w", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.gone {
		go term.close() // it waits for the client
		return x.errDeleted()
	}
	x.task.host.store.Put(x.keptName()+"tty", console)
	x.term = term
	return nil
}

func (x *execution) errDeleted() error {
	return fmt.Errorf("exec %s of task %s was deleted: %w", x.rec.ID, x.task.rec.Spec.ID, errdefs.ErrNotFound)
}

func (x *execution) exited(e proc.Exit) {
	x.update(func(r *execRecord) { r.Exit = &e })
	x.task.host.workers.Go(x.settle)
}

// drainTime bounds how long an exit waits for a client that reads slowly.
const drainTime = 30 * time.Second

func (x *execution) settle() {
	x.op <- struct{}{}
	x.mu.Lock()
	term := x.term
	x.mu.Unlock()
	<-x.op
	if term != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainTime)
		defer cancel()
		term.term.Drain(ctx)
	}
	x.ended.happen()
}

// delete forgets an exec that has ended or was never started.
func (x *execution) delete(ctx context.Context) (execRecord, error) {
	x.mu.Lock()
	rec := x.rec
	x.gone = x.gone || rec.Phase == phaseCreated
	x.mu.Unlock()
	if rec.Exit != nil {
		select {
		case <-x.ended.happened():
		case <-ctx.Done():
			return rec, ctx.Err()
		}
	} else if rec.Phase != phaseCreated {
		return rec, fmt.Errorf("exec %s is running; kill it first: %w", rec.ID, errdefs.ErrFailedPrecondition)
	}
	x.forget()
	x.task.mu.Lock()
	if x.task.execs[rec.ID] == x {
		delete(x.task.execs, rec.ID)
	}
	x.task.mu.Unlock()
	if err := os.Remove(x.path); err != nil && !os.IsNotExist(err) {
		return rec, fmt.Errorf("remove the record of exec %s: %w", rec.ID, err)
	}
	return rec, nil
}

func (x *execution) forget() {
	x.mu.Lock()
	x.gone = true
	term, pidfd := x.term, x.pidfd
	x.term, x.pidfd = nil, nil
	x.mu.Unlock()
	x.endUnmade()
	term.close()
	if pidfd != nil {
		pidfd.Close()
	}
	x.task.host.store.Clear(x.keptName())
}

// endUnmade tells those who wait for a deleted exec that never ran.
func (x *execution) endUnmade() {
	x.mu.Lock()
	never := x.gone && x.rec.Phase == phaseCreated
	x.mu.Unlock()
	if never {
		x.ended.happen()
	}
}

// recoverExecs takes up the execs of an earlier life.
func (t *task) recoverExecs(ctx context.Context, held map[string]*os.File) {
	paths, err := filepath.Glob(filepath.Join(t.dir, execPrefix+"*.json"))
	if err != nil {
		return
	}
	for _, path := range paths {
		var rec execRecord
		if err := load(path, &rec); err != nil || checkID("exec", rec.ID) != nil || !strings.HasSuffix(path, execPrefix+rec.ID+".json") {
			t.host.log.Warn("exec record not readable", "path", path, "err", err)
			continue
		}
		x := t.newExec(rec)
		t.execs[rec.ID] = x
		x.recover(ctx, take(held, x.keptName()+"tty"), take(held, x.keptName()+"pidfd"))
	}
}

func (x *execution) recover(ctx context.Context, console, pidfd *os.File) {
	rec := x.record()
	if console != nil && rec.IO.Terminal {
		if err := x.connect(ctx, console); err != nil {
			x.task.host.log.Warn("terminal of an exec is lost", "task", x.task.rec.Spec.ID, "exec", rec.ID, "err", err)
		}
	}
	switch {
	case rec.Exit != nil:
		x.pidfd = pidfd
		x.ended.happen()
	case rec.Init.Pid != 0:
		x.pidfd = x.task.host.backend.Watch(&x.task.rec.Spec, rec.Init, pidfd, x.exited)
	case rec.Phase == phaseStarting:
		// Its process, if it came into being, cannot be told from others; it
		// ends with the container.
		x.exited(proc.UnknownExit())
	}
}
