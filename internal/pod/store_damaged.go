package pod

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// One record that cannot be read must not keep all the others from being
// served. It is set aside as it is: moved to a bucket that nothing but fsck
// looks into, under its old bucket and key.

const damagedBucket = "damaged"

// damaged is a record that cannot be read.
type damaged struct {
	bucket, id string
	cause      error // not kept in the store
}

func (d damaged) key() []byte { return []byte(d.bucket + "/" + d.id) }

// what is the thing whose record it is.
func (d damaged) what() string {
	if d.bucket == sandboxBucket {
		return "pod sandbox"
	}
	return "container"
}

// check tells whether the record is one that this program wrote for id.
func (r *sandboxRecord) check(id string) error {
	known := []phase{creating, ready, stopping, stopped, removing}
	return cmp.Or(checkRecord(id, r.ID, r.Phase, known), present("metadata", r.Config.GetMetadata() != nil))
}

// check tells whether the record is one that this program wrote for id.
func (r *containerRecord) check(id string) error {
	known := []phase{creating, ready, running, exited, removing}
	return cmp.Or(checkRecord(id, r.ID, r.Phase, known), present("metadata", r.Config.GetMetadata() != nil),
		present("sandbox", r.SandboxID != ""), present("bundle", r.Bundle != ""))
}

func checkRecord(key, id string, at phase, known []phase) error {
	if id != key {
		return fmt.Errorf("it is one of %.80q", id)
	}
	if !slices.Contains(known, at) {
		return fmt.Errorf("it is in the phase %.80q, which there is not", at)
	}
	return nil
}

func present(what string, there bool) error {
	if there {
		return nil
	}
	return fmt.Errorf("it lacks its %s", what)
}

// setAside moves records out of the way.
func (s *store) setAside(bad []damaged) error {
	if len(bad) == 0 {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, d := range bad {
			b := tx.Bucket([]byte(d.bucket))
			if err := tx.Bucket([]byte(damagedBucket)).Put(d.key(), b.Get([]byte(d.id))); err != nil {
				return err
			}
			if err := b.Delete([]byte(d.id)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set unreadable records of the pod store aside: %w", err)
	}
	return nil
}

// damaged lists the records that were set aside.
func (s *store) damaged() ([]damaged, error) {
	var all []damaged
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(damagedBucket)).ForEach(func(k, _ []byte) error {
			bucket, id, _ := strings.Cut(string(k), "/")
			all = append(all, damaged{bucket: bucket, id: id})
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list the records that were set aside: %w", err)
	}
	return all, nil
}
