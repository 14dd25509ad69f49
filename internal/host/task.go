package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// task is one container. Lock order: op, then mu. op serializes what changes
// the container and is held while the backend works; mu guards the fields and
// is never held while anything else is waited for.
type task struct {
	host *Host
	dir  string
	op   chan struct{} // holds one token while an operation runs
	io   *taskIO       // nil when the client's FIFOs are used

	mu    sync.Mutex
	rec   taskRecord
	pidfd *os.File
	term  *clientTerminal // with the client's FIFOs and a terminal
	execs map[string]*execution
	gone  bool // deleted
	// making are the execs that the backend is at; it writes to dir meanwhile.
	making sync.WaitGroup
	ended  *event // the exit is known and its output is in the log, or there was no process
}

func (h *Host) newTask(rec taskRecord) *task {
	dir := h.taskDir(rec.Spec.ID)
	t := &task{host: h, dir: dir, op: make(chan struct{}, 1), rec: rec, execs: map[string]*execution{}, ended: newEvent()}
	if rec.IO.Client == nil {
		t.io = h.newIO(rec.Spec.ID, dir, rec.IO)
		t.io.stdinClosed = func() { t.update(func(r *taskRecord) { r.IO.StdinClosed = true }) }
	}
	return t
}

func (h *Host) newIO(id, dir string, spec ioSpec) *taskIO {
	return &taskIO{ioSpec: spec, dir: dir, name: keptName(id), store: h.store, bufs: &h.bufs, stdinClosed: func() {},
		slog: h.log.With("task", id)}
}

// keptName is the prefix of a task's files at the keeper.
func keptName(id string) string { return "t/" + id + "/" }

// lock takes op.
func (t *task) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case t.op <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another call on task %s: %w", t.rec.Spec.ID, ctx.Err())
	}
	t.mu.Lock()
	gone := t.gone
	t.mu.Unlock()
	if gone {
		<-t.op
		return nil, fmt.Errorf("task %s: %w", t.rec.Spec.ID, errdefs.ErrNotFound)
	}
	return func() { <-t.op }, nil
}

// update changes the record and writes it.
func (t *task) update(f func(*taskRecord)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f(&t.rec)
	if t.gone {
		return
	}
	if err := save(t.recordPath(), &t.rec); err != nil {
		// Memory is right; only a crash before the next write would show it.
		t.host.log.Error("task record not written", "task", t.rec.Spec.ID, "err", err)
	}
}

func (t *task) recordPath() string { return filepath.Join(t.dir, "task.json") }

// record gives a copy.
func (t *task) record() taskRecord {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rec
}

// create makes the task up to the point where Start can follow.
func (t *task) create(ctx context.Context) (pid int, err error) {
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return 0, fmt.Errorf("make the task's folder: %w", err)
	}
	if err := save(t.recordPath(), &t.rec); err != nil {
		return 0, err
	}
	if t.io != nil {
		if err := t.io.open(nil); err != nil {
			return 0, fmt.Errorf("prepare the streams: %w", err)
		}
	}
	if t.rec.Spec.RunOnStart {
		t.update(func(r *taskRecord) { r.Phase = phaseCreated })
		return 0, nil
	}
	pid, err = t.launch(ctx, t.host.backend.Create)
	if err != nil {
		return 0, err
	}
	t.update(func(r *taskRecord) { r.Phase = phaseCreated })
	return pid, nil
}

type launcher func(context.Context, *backend.TaskSpec, backend.Streams, func(proc.Exit)) (backend.Started, error)

// launch makes init with its streams; op is held.
func (t *task) launch(ctx context.Context, launch launcher) (pid int, err error) {
	var s backend.Streams
	if t.io != nil {
		s, err = t.io.childStreams()
	} else {
		s, err = t.rec.IO.Client.childStreams(ctx)
	}
	if err != nil {
		return 0, err
	}
	defer s.Close()
	st, err := launch(ctx, &t.rec.Spec, s, t.exited)
	if err != nil {
		if t.io != nil {
			t.io.discard()
		}
		return 0, err
	}
	t.mu.Lock()
	t.rec.Init, t.pidfd = st.Process, st.Pidfd
	t.mu.Unlock()
	t.host.store.Put(keptName(t.rec.Spec.ID)+"pidfd", st.Pidfd)
	if err := t.connect(ctx, st.Console, nil); err != nil {
		return 0, fmt.Errorf("connect the streams: %w", err)
	}
	return st.Pid, nil
}

// connect begins to carry output.
func (t *task) connect(ctx context.Context, console *os.File, held map[string]*os.File) error {
	if t.io != nil {
		return t.io.run(console, held)
	}
	if !t.rec.IO.Client.Terminal || console == nil {
		return nil
	}
	term, err := t.rec.IO.Client.startTerminal(ctx, console)
	if err != nil {
		return err
	}
	t.host.store.Put(keptName(t.rec.Spec.ID)+"tty", console)
	t.mu.Lock()
	t.term = term
	t.mu.Unlock()
	return nil
}

func (t *task) start(ctx context.Context) (pid int, err error) {
	unlock, err := t.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	rec := t.record()
	if rec.Phase != phaseCreated {
		return 0, fmt.Errorf("task %s was started already: %w", rec.Spec.ID, errdefs.ErrFailedPrecondition)
	}
	t.update(func(r *taskRecord) { r.Phase = phaseStarting })
	if rec.Spec.RunOnStart {
		pid, err = t.launch(ctx, t.host.backend.Start)
	} else {
		_, err = t.host.backend.Start(ctx, &t.rec.Spec, backend.Streams{}, t.exited)
		pid = rec.Init.Pid
	}
	if err != nil {
		t.update(func(r *taskRecord) { r.Phase = phaseCreated })
		return 0, err
	}
	t.update(func(r *taskRecord) { r.Phase = phaseStarted })
	return pid, nil
}

// exited is told of init's end; it puts it on disk and leaves the rest to
// settle.
func (t *task) exited(e proc.Exit) {
	t.update(func(r *taskRecord) { r.Exit = &e })
	t.host.workers.Go(t.settle)
}

const (
	settleTime = 10 * time.Second
	flushTime  = 3 * time.Second
)

// settle ends what init left running, learns whether memory ran out, and
// tells everybody once the last output is in the log.
func (t *task) settle() {
	t.op <- struct{}{} // a launch that is not through has yet to connect the streams
	defer func() { <-t.op }()
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	rec := t.record()
	oom, err := t.host.backend.Settle(ctx, &rec.Spec, rec.Init)
	if err != nil {
		t.host.log.Warn("task not settled cleanly", "task", rec.Spec.ID, "err", err)
	}
	oom = oom && rec.Exit.Status != 0
	if t.io != nil {
		fctx, cancel := context.WithTimeout(ctx, flushTime)
		if err := t.io.flush(fctx); err != nil {
			t.host.log.Warn("exit is told before the log is complete", "task", rec.Spec.ID, "err", err)
		}
		cancel()
		t.io.fan.Close()
	}
	t.mu.Lock()
	term := t.term
	t.mu.Unlock()
	if term != nil {
		term.term.Drain(ctx)
	}
	t.update(func(r *taskRecord) { r.OOM, r.Settled = oom, true })
	t.ended.happen()
	t.host.log.Info("task ended", "task", rec.Spec.ID, "status", rec.Exit.Status, "oom", oom, "unknown", rec.Exit.Unknown)
}

// delete removes the task. Init must have ended, or never been started.
func (t *task) delete(ctx context.Context) (taskRecord, error) {
	rec := t.record()
	if rec.Exit != nil {
		select {
		case <-t.ended.happened():
		case <-ctx.Done():
			return rec, fmt.Errorf("wait for the end of task %s: %w", rec.Spec.ID, ctx.Err())
		}
	}
	unlock, err := t.lock(ctx)
	if err != nil {
		return rec, err
	}
	defer unlock()
	if rec = t.record(); rec.Exit == nil && rec.Phase == phaseStarted {
		return rec, fmt.Errorf("task %s is running; kill it first: %w", rec.Spec.ID, errdefs.ErrFailedPrecondition)
	}
	return rec, t.remove(ctx)
}

// remove takes everything of the task away; op is held.
func (t *task) remove(ctx context.Context) error {
	if err := t.host.backend.Delete(ctx, &t.rec.Spec); err != nil {
		return fmt.Errorf("delete task %s: %w", t.rec.Spec.ID, err)
	}
	t.mu.Lock()
	t.gone = true
	execs := t.execs
	t.execs = nil
	pidfd, term := t.pidfd, t.term
	never := t.rec.Init.Pid == 0 && t.rec.Exit == nil
	t.mu.Unlock()
	if never {
		t.ended.happen()
	}
	for _, x := range execs {
		x.forget()
	}
	if t.io != nil {
		t.io.close()
	}
	term.close()
	if pidfd != nil {
		pidfd.Close()
	}
	t.host.store.Clear(keptName(t.rec.Spec.ID))
	t.host.forget(t)
	t.making.Wait() // not for long: what they are made in has ended
	if err := os.RemoveAll(t.dir); err != nil {
		return fmt.Errorf("remove the task's folder: %w", err)
	}
	return nil
}

// running gives the record when init runs.
func (t *task) running() (taskRecord, error) {
	rec := t.record()
	if rec.Exit != nil || rec.Init.Pid == 0 {
		return rec, fmt.Errorf("task %s is not running: %w", rec.Spec.ID, errdefs.ErrFailedPrecondition)
	}
	return rec, nil
}

// recover takes up a task that an earlier life left; held are its files that
// the keeper kept.
func (t *task) recover(ctx context.Context, held map[string]*os.File) error {
	t.op <- struct{}{}
	defer func() { <-t.op }()
	var err error
	if t.io != nil {
		err = t.io.open(held)
	}
	name := keptName(t.rec.Spec.ID)
	console := take(held, name+"tty")
	pidfd := take(held, name+"pidfd")
	switch rec := t.record(); {
	case rec.Exit != nil:
		err = errors.Join(err, t.reconnect(ctx, console, held))
		t.pidfd = pidfd
		if rec.Settled {
			t.sealRecovered()
		} else {
			t.host.workers.Go(t.settle)
		}
	case rec.Init.Pid != 0:
		err = errors.Join(err, t.reconnect(ctx, console, held))
		if rec.Phase != phaseStarted && (rec.Phase != phaseCreated || rec.Spec.RunOnStart) {
			t.update(func(r *taskRecord) { r.Phase = phaseStarted })
		}
		t.pidfd = t.host.backend.Watch(&t.rec.Spec, rec.Init, pidfd, t.exited)
	case rec.Phase == phaseCreating || rec.Phase == phaseStarting:
		err = errors.Join(err, t.find(ctx, console, held))
	}
	if t.pidfd != nil {
		t.host.store.Put(name+"pidfd", t.pidfd)
	}
	t.recoverExecs(ctx, held)
	for n, f := range held {
		if strings.HasPrefix(n, name) {
			f.Close()
			delete(held, n)
			t.host.store.Drop(n)
		}
	}
	return err
}

// sealRecovered marks a task as ended that was so in an earlier life.
func (t *task) sealRecovered() {
	if t.io != nil {
		t.io.fan.Close()
	}
	t.ended.happen()
}

func (t *task) reconnect(ctx context.Context, console *os.File, held map[string]*os.File) error {
	if t.record().IO.Terminal && console == nil {
		return nil // it went with the keeper, and so did the container
	}
	return t.connect(ctx, console, held)
}

// find asks the backend about an init that was being made.
func (t *task) find(ctx context.Context, console *os.File, held map[string]*os.File) error {
	was := t.record().Phase
	st, found, err := t.host.backend.Find(ctx, &t.rec.Spec, t.exited)
	if err != nil {
		return fmt.Errorf("find out what became of task %s: %w", t.rec.Spec.ID, err)
	}
	if !found {
		// Start can be called again; a half-made Create is for Delete only.
		t.update(func(r *taskRecord) { r.Phase = phaseCreated })
		return nil
	}
	t.pidfd = st.Pidfd
	if st.Console != nil {
		console = st.Console
	}
	err = t.reconnect(ctx, console, held)
	t.update(func(r *taskRecord) {
		r.Init = st.Process
		r.Phase = phaseStarted
		if was == phaseCreating {
			r.Phase = phaseCreated
		}
	})
	return err
}
