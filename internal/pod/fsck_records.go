package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ids lists the ids that have a record in the database, readable or not.
func (s *store) ids(buckets ...string) ([]string, error) {
	var ids []string
	err := s.db.View(func(tx *bolt.Tx) error {
		for _, b := range buckets {
			err := tx.Bucket([]byte(b)).ForEach(func(k, _ []byte) error {
				ids = append(ids, string(k))
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the records of the pod store: %w", err)
	}
	return ids, nil
}

const (
	busyTime = 100 * time.Millisecond // how long to wait for a running operation, which knows better
	exitTime = 5 * time.Second        // how long to wait for the watcher of a container that is gone
)

// checkRecords finds sandboxes and containers whose things are gone, and with
// repair brings their records to what is left. Those with an operation under
// way are left to it.
func (s *Service) checkRecords(ctx context.Context, repair bool) ([]Finding, error) {
	found, err := s.checkDamaged(repair)
	if err != nil {
		return found, err
	}
	for _, c := range s.index.allContainers() {
		if f := s.checkContainer(ctx, c, repair); f != nil {
			found = append(found, *f)
		}
	}
	for _, sb := range s.index.allSandboxes() {
		if f := s.checkSandbox(ctx, sb, repair); f != nil {
			found = append(found, *f)
		}
	}
	if err := ctx.Err(); err != nil {
		return found, fmt.Errorf("check: %w", err)
	}
	return found, nil
}

// checkDamaged lists the records that were set aside, and with repair forgets
// them; what they were about is found as things without an owner.
func (s *Service) checkDamaged(repair bool) ([]Finding, error) {
	all, err := s.store.damaged()
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, d := range all {
		f := Finding{Kind: "record", ID: d.id, Path: s.store.db.Path(),
			Detail: "the record of this " + d.what() + " cannot be read and was set aside; what is left of it on the node is listed beside it"}
		if repair {
			f.repaired(s.store.delete(damagedBucket, string(d.key())))
		}
		found = append(found, f)
	}
	return found, nil
}

// lockedBriefly runs f unless another operation holds the lock for long.
func lockedBriefly(ctx context.Context, l opLock, f func() *Finding) *Finding {
	wait, cancel := context.WithTimeout(ctx, busyTime)
	defer cancel()
	if l.lock(wait) != nil {
		return nil
	}
	defer l.unlock()
	return f()
}

func (f *Finding) repaired(err error) {
	if err != nil {
		f.Err = err.Error()
		return
	}
	f.Repaired = true
}

func (s *Service) checkSandbox(ctx context.Context, sb *sandbox, repair bool) *Finding {
	return lockedBriefly(ctx, sb.op, func() *Finding {
		v := sb.get()
		if _, err := s.index.sandbox(v.ID); err != nil || sb.phase() != ready {
			return nil
		}
		missing := s.missingOf(v)
		if missing == "" {
			return nil
		}
		f := &Finding{Kind: "record", ID: v.ID, Path: s.podDir(v.ID), Detail: "the pod is ready in the store, but " + missing}
		if repair {
			f.repaired(s.stopSandbox(ctx, sb))
		}
		return f
	})
}

// missingOf tells what a ready sandbox lacks on the machine, "" when nothing.
func (s *Service) missingOf(v Sandbox) string {
	if !mountRoot(s.podDir(v.ID)) {
		return "its folder is not mounted"
	}
	if v.NetNS != "" && !mountRoot(v.NetNS) {
		return "its network namespace is not pinned"
	}
	return ""
}

func (s *Service) checkContainer(ctx context.Context, c *container, repair bool) *Finding {
	v := c.get()
	if _, err := s.index.sandbox(v.SandboxID); errdefs.IsNotFound(err) {
		if _, err := s.index.container(v.ID); err != nil {
			return nil // removed with its pod just now
		}
		f := &Finding{Kind: "record", ID: v.ID, Detail: "container of pod " + v.SandboxID + ", which does not exist"}
		if repair {
			f.repaired(s.RemoveContainer(ctx, v.ID))
		}
		return f
	}
	switch c.phase() {
	case running:
		return s.checkRunning(ctx, c, repair)
	case ready:
		return s.checkCreated(ctx, c, repair)
	}
	return nil
}

// checkRunning looks for containers that run in the store alone. Their watcher
// is the one who notes exits, so it is only waited for.
func (s *Service) checkRunning(ctx context.Context, c *container, repair bool) *Finding {
	if c.handler == nil {
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, statsTime)
	defer cancel()
	_, err := c.task(s).State(ask)
	if !errdefs.IsNotFound(err) || c.phase() != running {
		return nil
	}
	f := &Finding{Kind: "record", ID: c.get().ID, Detail: "the container runs in the store, but its shim does not know it"}
	if !repair {
		return f
	}
	select {
	case <-c.ended.passed():
		f.repaired(nil)
	case <-time.After(exitTime):
		f.repaired(errors.New("its end was not noticed; stop or remove the container"))
	case <-ctx.Done():
		f.repaired(ctx.Err())
	}
	return f
}

// checkCreated looks for containers that were created and cannot be started
// any more.
func (s *Service) checkCreated(ctx context.Context, c *container, repair bool) *Finding {
	return lockedBriefly(ctx, c.op, func() *Finding {
		v := c.get()
		if c.phase() != ready || v.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			return nil
		}
		_, err := os.Stat(filepath.Join(v.Bundle, "config.json"))
		if err == nil && mountRoot(filepath.Join(v.Bundle, "rootfs")) {
			return nil
		}
		f := &Finding{Kind: "record", ID: v.ID, Path: v.Bundle, Detail: "the container waits to be started, but its bundle or root file system is gone"}
		if repair {
			f.repaired(s.noteFailedStart(c, errors.New("its bundle or root file system was gone")))
		}
		return f
	})
}
