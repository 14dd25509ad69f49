package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// A running pull holds a lease, so that the collector leaves its content
// alone. What a failed pull fetched goes over to a lease that ends by itself:
// the next pull of the name resumes, and an abandoned one frees its disk within
// the hour.
const (
	labelPull    = "cloister.dev/pull" // on both kinds of lease; holds the image name
	labelExpire  = "containerd.io/gc.expire"
	leasePull    = "pull-"
	leaseResume  = "resume-"
	keepPartial  = 50 * time.Minute
	leaseTimeout = 10 * time.Second
)

func resumeLease(ref string) leases.Lease {
	sum := sha256.Sum256([]byte(ref))
	return leases.Lease{ID: leaseResume + hex.EncodeToString(sum[:16])}
}

func (s *Store) newLease(ctx context.Context, ref string) (leases.Lease, error) {
	l, err := s.leases.Create(ctx, leases.WithRandomID(), func(l *leases.Lease) error {
		l.ID = leasePull + l.ID
		return nil
	}, leases.WithLabel(labelPull, ref))
	if err != nil {
		return l, fmt.Errorf("lease for the pull: %w", err)
	}
	return l, nil
}

// endLeases deletes those of the leases that exist.
func (s *Store) endLeases(ctx context.Context, list ...leases.Lease) error {
	for _, l := range list {
		if err := s.leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("end lease %s: %w", l.ID, err)
		}
	}
	return nil
}

// abandon ends the lease of a failed pull and keeps what it fetched for a
// while, unless it was the disk that failed it. It works after the pull's
// context has ended.
func (s *Store) abandon(l leases.Lease, why error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), leaseTimeout)
	defer cancel()
	if isNoSpace(why) {
		s.reserve.release()
	}
	err := s.update(ctx, func(ctx context.Context) error {
		if isNoSpace(why) {
			return s.endLeases(ctx, l, resumeLease(l.Labels[labelPull]))
		}
		return s.convert(ctx, l)
	})
	if err != nil {
		s.log.Warn("what a failed pull fetched stays until the next start", "lease", l.ID, "error", err)
	}
	s.gc.keepUntil(time.Now().Add(keepPartial))
	s.gc.kick()
}

// convert moves blobs, partial blobs and unpacked layers from a pull's lease
// to the resumption lease of the same image. Half-unpacked layers stay behind.
func (s *Store) convert(ctx context.Context, from leases.Lease) error {
	have, err := s.leases.ListResources(ctx, from)
	if err != nil {
		return fmt.Errorf("resources of lease %s: %w", from.ID, err)
	}
	to := resumeLease(from.Labels[labelPull])
	old, err := s.leases.ListResources(ctx, to)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("resources of lease %s: %w", to.ID, err)
	}
	if err := s.endLeases(ctx, from, to); err != nil {
		return err
	}
	if len(have)+len(old) == 0 {
		return nil
	}
	labels := map[string]string{labelPull: from.Labels[labelPull], labelExpire: time.Now().Add(keepPartial).UTC().Format(time.RFC3339)}
	if _, err := s.leases.Create(ctx, leases.WithID(to.ID), leases.WithLabels(labels)); err != nil {
		return fmt.Errorf("lease for resumption: %w", err)
	}
	for _, r := range append(have, old...) {
		if strings.HasPrefix(r.Type, "snapshots/") && !strings.HasPrefix(r.ID, "sha256:") {
			continue
		}
		if err := s.leases.AddResource(ctx, to, r); err != nil {
			return fmt.Errorf("keep %s %s: %w", r.Type, r.ID, err)
		}
	}
	return nil
}

// adoptLeases finds what pulls of an earlier daemon left: no pull is under way
// while the store opens, so each pull lease is one of a daemon that died.
func (s *Store) adoptLeases(ctx context.Context) error {
	list, err := s.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	var errs []error
	for _, l := range list {
		switch {
		case strings.HasPrefix(l.ID, leasePull):
			s.log.Info("a pull was interrupted; its content is kept for a while", "ref", l.Labels[labelPull])
			errs = append(errs, s.update(ctx, func(ctx context.Context) error { return s.convert(ctx, l) }))
			s.gc.keepUntil(time.Now().Add(keepPartial))
		case strings.HasPrefix(l.ID, leaseResume):
			if at, err := time.Parse(time.RFC3339, l.Labels[labelExpire]); err == nil {
				s.gc.keepUntil(at)
			}
		}
	}
	return errors.Join(errs...)
}
