package pod

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"

	"cloister.dev/internal/shim"
)

// opLock admits one life-cycle operation at a time; unlike a mutex its waiters
// can give up.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the running operation on it: %w", ctx.Err())
	}
}

func (l opLock) unlock() { <-l }

// milestone is passed once and stays so.
type milestone struct {
	once sync.Once
	ch   chan struct{}
}

func newMilestone() *milestone { return &milestone{ch: make(chan struct{})} }

func (m *milestone) pass() { m.once.Do(func() { close(m.ch) }) }

func (m *milestone) passed() <-chan struct{} { return m.ch }

// sandbox is a pod sandbox in memory.
type sandbox struct {
	op      opLock
	handler *shim.Handler

	mu   sync.Mutex    // one change at a time
	rec  sandboxRecord // guarded by mu
	gone bool          // its record was deleted; guarded by mu
	snap atomic.Pointer[sandboxRecord]
}

// container is a container in memory.
type container struct {
	op      opLock
	handler *shim.Handler

	mu   sync.Mutex      // one change at a time
	rec  containerRecord // guarded by mu
	gone bool            // its record was deleted; guarded by mu
	note bool            // its record is noted only; guarded by mu
	snap atomic.Pointer[containerRecord]

	announced bool // plugins may know of it; guarded by op

	ended   *milestone  // it has exited
	deleted *milestone  // after its exit, the shim has forgotten it, or was asked to
	onShim  atomic.Bool // it was asked, and may know it still
}

// record gives the record as it was last stored; it does not change.
func (sb *sandbox) record() *sandboxRecord    { return sb.snap.Load() }
func (c *container) record() *containerRecord { return c.snap.Load() }

func (sb *sandbox) get() Sandbox    { return sb.record().Sandbox }
func (c *container) get() Container { return c.record().Container }

// removed tells whether its record was deleted.
func (c *container) removed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

func (c *container) task(s *Service) shim.Task {
	v := c.get()
	return c.handler.Task(v.ID, v.SandboxID, s.podDir(v.SandboxID))
}

// index finds sandboxes and containers by id.
type index struct {
	mu         sync.RWMutex // never held across I/O
	sandboxes  map[string]*sandbox
	containers map[string]*container
}

func (x *index) init() {
	x.sandboxes, x.containers = map[string]*sandbox{}, map[string]*container{}
}

func (x *index) addSandbox(sb *sandbox) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.sandboxes[sb.record().ID] = sb
}

func (x *index) addContainer(c *container) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.containers[c.record().ID] = c
}

func (x *index) dropSandbox(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.sandboxes, id)
}

func (x *index) dropContainer(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.containers, id)
}

func (x *index) sandbox(id string) (*sandbox, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return find(x.sandboxes, id, "pod sandbox")
}

func (x *index) container(id string) (*container, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return find(x.containers, id, "container")
}

// find looks id up, or the one entry whose id starts with it.
func find[E any](m map[string]*E, id, what string) (*E, error) {
	if e := m[id]; e != nil {
		return e, nil
	}
	var found *E
	if id != "" && len(id) < idLength {
		for k, e := range m {
			if !strings.HasPrefix(k, id) {
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("%s id %q is ambiguous, give more of it: %w", what, id, errdefs.ErrInvalidArgument)
			}
			found = e
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s %.80q: %w", what, id, errdefs.ErrNotFound)
	}
	return found, nil
}

func (x *index) allSandboxes() []*sandbox {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := make([]*sandbox, 0, len(x.sandboxes))
	for _, sb := range x.sandboxes {
		all = append(all, sb)
	}
	return all
}

func (x *index) allContainers() []*container {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := make([]*container, 0, len(x.containers))
	for _, c := range x.containers {
		all = append(all, c)
	}
	return all
}

// containersOf lists the containers of one sandbox.
func (x *index) containersOf(sandboxID string) []*container {
	var of []*container
	for _, c := range x.allContainers() {
		if c.get().SandboxID == sandboxID {
			of = append(of, c)
		}
	}
	return of
}

// Sandbox gives a sandbox by its id or an unambiguous beginning of it.
func (s *Service) Sandbox(id string) (Sandbox, error) {
	sb, err := s.index.sandbox(id)
	if err != nil {
		return Sandbox{}, err
	}
	return sb.get(), nil
}

// Sandboxes gives all sandboxes, in no order.
func (s *Service) Sandboxes() []Sandbox {
	entries := s.index.allSandboxes()
	all := make([]Sandbox, 0, len(entries))
	for _, sb := range entries {
		all = append(all, sb.get())
	}
	return all
}

// Container gives a container by its id or an unambiguous beginning of it.
func (s *Service) Container(id string) (Container, error) {
	c, err := s.index.container(id)
	if err != nil {
		return Container{}, err
	}
	return c.get(), nil
}

// Containers gives all containers, in no order.
func (s *Service) Containers() []Container {
	entries := s.index.allContainers()
	all := make([]Container, 0, len(entries))
	for _, c := range entries {
		all = append(all, c.get())
	}
	return all
}

// changeSandbox changes the record of a sandbox: on disk first, then for
// readers. A deleted record is not written again.
func (s *Service) changeSandbox(sb *sandbox, change func(*sandboxRecord)) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	rec := sb.rec
	if sb.gone {
		return fmt.Errorf("pod sandbox %.13s was removed meanwhile: %w", rec.ID, errdefs.ErrNotFound)
	}
	change(&rec)
	rec.State = rec.Phase.sandboxState()
	if err := s.store.put(sandboxBucket, rec.ID, rec); err != nil {
		return err
	}
	sb.rec = rec
	sb.snap.Store(&rec)
	return nil
}

// changeContainer changes the record of a container: on disk first, then for
// readers. A deleted record is not written again.
func (s *Service) changeContainer(c *container, change func(*containerRecord)) error {
	return s.keepChange(c, change, s.storeRecord)
}

// noteContainer is changeContainer for what need not outlive a power cut; the
// database follows.
func (s *Service) noteContainer(c *container, change func(*containerRecord)) error {
	if err := s.keepChange(c, change, s.noteRecord); err != nil {
		return err
	}
	s.behind.add(c)
	return nil
}

func (s *Service) keepChange(c *container, change func(*containerRecord), keep func(*container, *containerRecord) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	rec := c.rec
	if c.gone {
		return fmt.Errorf("container %.13s was removed meanwhile: %w", rec.ID, errdefs.ErrNotFound)
	}
	change(&rec)
	rec.State = rec.Phase.containerState()
	rec.Rev++
	if rec.Phase.noted() {
		keep = s.noteRecord
	}
	if err := keep(c, &rec); err != nil {
		return err
	}
	c.rec = rec
	c.snap.Store(&rec)
	return nil
}

// noteRecord notes a record; c.mu is held.
func (s *Service) noteRecord(c *container, rec *containerRecord) error {
	if err := s.store.note(rec); err != nil {
		return err
	}
	c.note = true
	return nil
}

// storeRecord stores a record, and removes its note; c.mu is held.
func (s *Service) storeRecord(c *container, rec *containerRecord) error {
	if err := s.store.put(containerBucket, rec.ID, rec); err != nil {
		return err
	}
	s.dropNote(c)
	return nil
}

// dropNote removes the note of a container whose record is stored; c.mu is held.
func (s *Service) dropNote(c *container) {
	if !c.note {
		return
	}
	c.note = false
	if err := s.store.forgetNote(c.rec.ID); err != nil { // the next start sees that it is out of date
		s.log.Warn("a note that is out of date stays", "container", c.rec.ID, "err", err)
	}
}

// deleteSandbox forgets a sandbox of which nothing is left: on disk, then for
// readers, then its name.
func (s *Service) deleteSandbox(sb *sandbox) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if err := s.store.delete(sandboxBucket, sb.rec.ID); err != nil {
		return err
	}
	sb.gone = true
	s.index.dropSandbox(sb.rec.ID)
	s.attempts.release(sb.rec.Name, sb.rec.ID)
	s.stats.forgetSandbox(sb.rec.ID)
	selinux.ReleaseLabel(sb.rec.ProcessLabel)
	return nil
}

// deleteContainer forgets a container of which nothing is left.
func (s *Service) deleteContainer(c *container) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.store.delete(containerBucket, c.rec.ID); err != nil {
		return err
	}
	if err := s.store.forgetNote(c.rec.ID); err != nil {
		return err
	}
	c.gone = true
	s.index.dropContainer(c.rec.ID)
	s.attempts.release(c.rec.Name, c.rec.ID)
	s.stats.forgetContainer(c.rec.ID)
	return nil
}
