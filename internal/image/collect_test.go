package image

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestCollectorSparesNewRootfs prepares root file systems while the collector
// runs without a pause: none may lose its folders.
func TestCollectorSparesNewRootfs(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	img := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
	ctx, cancel := context.WithCancel(t.Context())
	var collecting, preparing sync.WaitGroup
	collecting.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			// Something must have been removed for snapshots to be looked at.
			key := fmt.Sprintf("bait-%d", i)
			if _, err := s.PrepareRootfs(ctx, key, img, RootfsOptions{}); err == nil {
				err = s.RemoveRootfs(ctx, key)
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
			if err := s.collectNow(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for w := range 4 {
		preparing.Go(func() {
			for i := range 40 {
				mounts, err := s.PrepareRootfs(ctx, fmt.Sprintf("c-%d-%d", w, i), img, RootfsOptions{})
				if err != nil {
					t.Error(err)
					continue
				}
				for _, o := range mounts[0].Options {
					if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
						if _, err := os.Stat(dir); err != nil {
							t.Errorf("root file system %d-%d: %v", w, i, err)
						}
					}
				}
			}
		})
	}
	preparing.Wait()
	cancel()
	collecting.Wait()
	keys, err := s.Rootfs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		mounts, err := s.RootfsMounts(t.Context(), key)
		if err != nil {
			t.Errorf("root file system %s: %v", key, err)
			continue
		}
		for _, o := range mounts[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				if _, err := os.Stat(dir); err != nil {
					t.Errorf("after the collections: %v", err)
				}
			}
		}
	}
}
