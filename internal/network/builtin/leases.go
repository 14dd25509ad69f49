package builtin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/network"
	"cloister.dev/internal/osutil"
)

// Leases are kept in a journal: one line for each lease taken or given back,
// appended with one write before the act that it stands for. A line that a
// power failure cut off is the last one, and is dropped; the pods of that time
// are gone as well. The journal is rewritten when most of it is history.

const (
	journalName = "leases"
	// firstSlot leaves the subnet's own address and the gateway out.
	firstSlot = 2
	maxSlots  = 1 << 18
	// history is how many lines more than leases the journal may have.
	history = 4096
)

// lease is what one sandbox holds. The slot is its place in every subnet.
type lease struct {
	ID   string `json:"id"`
	Slot uint32 `json:"slot,omitempty"`
	// Addrs are the addresses of the slot; the subnets may be others by now.
	Addrs []netip.Prefix        `json:"addrs,omitempty"`
	Ports []network.PortMapping `json:"ports,omitempty"`
	// Boot is when it was taken: after a reboot the pod is gone, but not yet
	// detached.
	Boot string `json:"boot,omitempty"`
	Free bool   `json:"free,omitempty"` // the lease ends here
}

type leases struct {
	path    string
	boot    string
	subnets []netip.Prefix
	lock    *os.File

	mu    sync.Mutex
	file  *os.File
	lines int
	slots uint32   // number of slots, the first two not usable
	used  []uint64 // bit per slot
	next  uint32   // where to look first: addresses rest before their reuse
	byID  map[string]lease
}

func openLeases(dir string, subnets []netip.Prefix) (*leases, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make folder for leases: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of leases: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("leases in %s are in use by another process, give each instance its own state folder: %w", dir, errors.Join(err, errdefs.ErrUnavailable))
	}
	boot, err := osutil.BootID()
	if err != nil {
		lock.Close()
		return nil, err
	}
	slots := slotsOf(subnets)
	l := &leases{
		subnets: subnets,
		path:    filepath.Join(dir, journalName), boot: boot, lock: lock,
		slots: slots, used: make([]uint64, (slots+63)/64), next: firstSlot, byID: map[string]lease{},
	}
	if err := l.read(); err != nil {
		lock.Close()
		return nil, err
	}
	if err := l.rewrite(); err != nil {
		lock.Close()
		return nil, err
	}
	return l, nil
}

func (l *leases) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.file.Close(), l.lock.Close())
}

func (l *leases) read() error {
	data, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read leases: %w", err)
	}
	for len(data) > 0 {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		data = rest
		if !whole {
			break
		}
		var e lease
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("leases in %s are damaged (%q): remove the file when no pod runs: %w", l.path, line, errors.Join(err, errdefs.ErrDataLoss))
		}
		l.apply(e)
	}
	return nil
}

// apply changes memory as one line of the journal says.
func (l *leases) apply(e lease) {
	if old, ok := l.byID[e.ID]; ok {
		l.mark(old.Slot, false)
		delete(l.byID, e.ID)
	}
	if e.Free {
		return
	}
	l.byID[e.ID] = e
	l.mark(e.Slot, true)
	if e.Slot+1 > firstSlot {
		l.next = e.Slot + 1
	}
}

func (l *leases) mark(slot uint32, used bool) {
	if slot >= l.slots { // of a time when the subnet was larger
		return
	}
	if used {
		l.used[slot/64] |= 1 << (slot % 64)
	} else {
		l.used[slot/64] &^= 1 << (slot % 64)
	}
}

// rewrite replaces the journal by one without history.
func (l *leases) rewrite() error {
	var b bytes.Buffer
	for _, e := range l.byID {
		b.Write(line(e))
	}
	tmp := l.path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	_, err = f.Write(b.Bytes())
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, l.path)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("write leases: %w", errors.Join(err, os.Remove(tmp)))
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.lines = f, len(l.byID)
	return nil
}

func line(e lease) []byte {
	b, err := json.Marshal(e)
	if err != nil { // only strings and numbers
		panic(err)
	}
	return append(b, '\n')
}

// append writes one line. A line that was written in part is cut off again, or
// the next one would be lost with it.
func (l *leases) append(e lease) error {
	end, err := l.file.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("write leases: %w", err)
	}
	if _, err := l.file.Write(line(e)); err != nil {
		return fmt.Errorf("write leases: %w", errors.Join(err, l.file.Truncate(end)))
	}
	l.lines++
	return nil
}

// take gives the sandbox a slot.
func (l *leases) take(id string, ports []network.PortMapping) (lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.byID[id]; ok {
		return lease{}, fmt.Errorf("sandbox %s is attached already: %w", id, errdefs.ErrAlreadyExists)
	}
	slot, ok := l.free()
	if !ok {
		return lease{}, fmt.Errorf("no address is free: %d sandboxes hold one: %w", len(l.byID), errdefs.ErrResourceExhausted)
	}
	e := lease{ID: id, Slot: slot, Ports: slices.Clone(ports), Boot: l.boot}
	for _, s := range l.subnets {
		e.Addrs = append(e.Addrs, at(s, slot))
	}
	if err := l.append(e); err != nil {
		return lease{}, err
	}
	l.apply(e)
	return e, nil
}

// free finds a slot, starting at next, a word at a time.
func (l *leases) free() (uint32, bool) {
	if l.slots <= firstSlot {
		return 0, false
	}
	find := func(from, to uint32) (uint32, bool) {
		for s := from; s < to; {
			inverted := ^l.used[s/64] >> (s % 64)
			if inverted != 0 {
				s += uint32(bits.TrailingZeros64(inverted))
				return s, s < to
			}
			s = (s/64 + 1) * 64
		}
		return 0, false
	}
	if s, ok := find(max(l.next, firstSlot), l.slots); ok {
		return s, true
	}
	return find(firstSlot, l.slots)
}

// give takes the lease back; unknown is fine.
func (l *leases) give(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.byID[id]; !ok {
		return nil
	}
	e := lease{ID: id, Free: true}
	if err := l.append(e); err != nil {
		return err
	}
	l.apply(e)
	if l.lines > len(l.byID)+history {
		return l.rewrite()
	}
	return nil
}

func (l *leases) has(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.byID[id]
	return ok
}

func (l *leases) all() []lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]lease, 0, len(l.byID))
	for _, e := range l.byID {
		out = append(out, e)
	}
	return out
}
