package image

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// PruneOptions say what may be removed.
type PruneOptions struct {
	// InUse tells of an image ID whether something needs it. It is asked right
	// before the image is removed.
	InUse func(id string) bool
	// Age spares images that were pulled more recently: what is to use them may
	// not be there yet.
	Age time.Duration
	// DryRun removes nothing.
	DryRun bool
}

// Pruned is an image that was removed, or would be.
type Pruned struct {
	Image Image
	Err   error
}

// Prune removes the images that nothing needs: neither pinned, nor in use, nor
// just being pulled. Their content goes soon after, but for what other images
// and root file systems share.
func (s *Store) Prune(ctx context.Context, o PruneOptions) ([]Pruned, error) {
	var out []Pruned
	for _, img := range s.List() {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		if img.Pinned || o.InUse(img.ID) || s.beingPulled(img) {
			continue
		}
		pulled, err := s.pulledAt(ctx, img)
		if err != nil {
			return out, err
		}
		if time.Since(pulled) < o.Age {
			continue
		}
		p := Pruned{Image: img}
		if !o.DryRun {
			p.Err = s.Remove(ctx, img.ID)
		}
		out = append(out, p)
	}
	return out, nil
}

// pulledAt is when the image was recorded last.
func (s *Store) pulledAt(ctx context.Context, img Image) (time.Time, error) {
	record, err := s.images.Get(s.within(ctx), img.ID)
	if errdefs.IsNotFound(err) {
		return time.Time{}, nil
	}
	return record.UpdatedAt, err
}

func (s *Store) beingPulled(img Image) bool {
	for _, name := range slices.Concat(img.RepoTags, img.RepoDigests) {
		if s.underWay(name) != nil {
			return true
		}
	}
	return false
}
