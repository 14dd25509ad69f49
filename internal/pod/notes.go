package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

// What a record tells of is partly gone with the machine's boot: mounts and
// processes. That much of it has to outlive this program, but not a power cut,
// and is not worth the two times that a database waits for the disk. It is
// noted in the state folder instead:
//
//   - that a container is being made, or removed: intents. After a power cut
//     there is nothing to finish but files without a record, which dropForgotten
//     removes, and a removal that its client repeats.
//   - that it runs: the database follows within behindTime. A power cut before
//     makes it one that was never started, which the node's restart makes of it
//     as well.
//
// A record and a note have numbers, and the higher one is right.

const (
	behindTime = 200 * time.Millisecond // how long the database may be behind the notes
	retryTime  = 10 * time.Second       // and longer by, after it could not be written
)

// noted tells whether a record of that phase is noted, not stored.
func (p phase) noted() bool { return p == creating || p == removing }

func (s *store) notePath(id string) string { return filepath.Join(s.notes, id) }

// note keeps a record in the state folder. One that is cut off counts as none:
// nothing has been done about it yet.
func (s *store) note(rec *containerRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode the record of %s: %w", rec.ID, err)
	}
	if err := os.WriteFile(s.notePath(rec.ID), data, 0o600); err != nil {
		return fmt.Errorf("note the record of %s: %w", rec.ID, err)
	}
	return nil
}

// forgetNote removes a note; an absent one is success.
func (s *store) forgetNote(id string) error {
	if err := os.Remove(s.notePath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the note of %s: %w", id, err)
	}
	return nil
}

// containers reads all records of containers, each the newer one of the
// database's and the note's, and gives those that cannot be read beside them.
func (s *store) containers() ([]*containerRecord, []damaged, error) {
	all, bad, err := load[containerRecord](s, containerBucket)
	if err != nil {
		return nil, nil, err
	}
	stored := make(map[string]*containerRecord, len(all))
	for _, rec := range all {
		stored[rec.ID] = rec
	}
	noted, err := s.noted()
	if err != nil {
		return nil, nil, err
	}
	var late []*containerRecord
	for _, id := range noted {
		rec, err := s.readNote(id)
		if err != nil {
			return nil, nil, err
		}
		switch was := stored[id]; {
		case rec != nil && was == nil && rec.Phase == creating:
			all = append(all, rec)
		case rec != nil && was != nil && rec.Rev > was.Rev:
			*was = *rec
			if !rec.Phase.noted() {
				late = append(late, rec)
			}
		default: // cut off before anything was done about it, or out of date
			if err := s.forgetNote(id); err != nil {
				return nil, nil, err
			}
		}
	}
	if err := s.putContainers(late); err != nil {
		return nil, nil, err
	}
	for _, rec := range late {
		if err := s.forgetNote(rec.ID); err != nil {
			return nil, nil, err
		}
	}
	return all, bad, nil
}

// noted lists the files of notes.
func (s *store) noted() ([]string, error) {
	entries, err := os.ReadDir(s.notes)
	if err != nil {
		return nil, fmt.Errorf("list the notes: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// readNote gives nil for what is no whole note.
func (s *store) readNote(id string) (*containerRecord, error) {
	data, err := os.ReadFile(s.notePath(id))
	if err != nil {
		return nil, fmt.Errorf("read a note: %w", err)
	}
	rec := &containerRecord{}
	if whole := json.Unmarshal(data, rec) == nil && rec.check(id) == nil; !whole {
		rec = nil
	}
	return rec, nil
}

// behind stores what was only noted, soon and much at a time.
type behind struct {
	mu      sync.Mutex // leaf lock
	waiting []*container
	wake    chan struct{}
}

func newBehind() *behind { return &behind{wake: make(chan struct{}, 1)} }

func (b *behind) add(cs ...*container) {
	b.mu.Lock()
	b.waiting = append(b.waiting, cs...)
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *behind) take() []*container {
	b.mu.Lock()
	defer b.mu.Unlock()
	cs := b.waiting
	b.waiting = nil
	return cs
}

// followNotes brings the database up to the notes until the service ends.
func (s *Service) followNotes() {
	for pause := behindTime; ; {
		select {
		case <-s.behind.wake:
		case <-s.ctx.Done():
		}
		select {
		case <-time.After(pause):
		case <-s.ctx.Done(): // what comes later stays noted
		}
		cs := s.behind.take()
		err := s.storeNoted(cs)
		pause = behindTime
		if err != nil {
			s.log.Error("records of running containers are only noted, trying again", "containers", len(cs), "err", err)
			pause = retryTime
			s.behind.add(cs...)
		}
		if s.ctx.Err() != nil {
			return
		}
	}
}

// storeNoted stores the records of containers in one transaction. Nothing that
// waits for one of their locks holds the database's.
func (s *Service) storeNoted(cs []*container) error {
	var recs []*containerRecord
	var held []*container
	defer func() {
		for _, c := range held {
			c.mu.Unlock()
		}
	}()
	seen := map[*container]bool{}
	for _, c := range cs {
		if seen[c] {
			continue
		}
		seen[c] = true
		c.mu.Lock()
		held = append(held, c)
		if c.note && !c.gone && !c.rec.Phase.noted() {
			recs = append(recs, &c.rec)
		}
	}
	if err := s.store.putContainers(recs); err != nil {
		return err
	}
	for _, c := range held {
		if !c.gone && !c.rec.Phase.noted() {
			s.dropNote(c)
		}
	}
	return nil
}

func (s *store) putContainers(recs []*containerRecord) error {
	if len(recs) == 0 {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, rec := range recs {
			data, err := json.Marshal(rec)
			if err != nil {
				return err
			}
			if err := tx.Bucket([]byte(containerBucket)).Put([]byte(rec.ID), data); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write records to the pod store: %w", err)
	}
	return nil
}
