package main

import (
	"log/slog"
	"testing"

	"cloister.dev/internal/config"
	"cloister.dev/internal/image"
)

// TestKeysReachTheImages: keys of the images' tables, and of those beside them,
// are told to the store.
func TestKeysReachTheImages(t *testing.T) {
	for key, c := range map[string]struct {
		set  func(*config.Config)
		told func(image.Options) bool
	}{
		"image_pull_with_sync_fs": {func(c *config.Config) { c.Images.ImagePullWithSyncFS = true }, func(o image.Options) bool { return o.SyncFS }},
		"sync_fs":                 {func(c *config.Config) { c.Plugins.Differs.SyncFS = true }, func(o image.Options) bool { return o.SyncFS }},
		"concurrent_layer_fetch_buffer": {func(c *config.Config) { c.Images.ConcurrentLayerFetchBuffer = 4096 },
			func(o image.Options) bool { return o.LayerFetchBuffer == 4096 }},
		"max_concurrent_downloads": {func(c *config.Config) { c.Images.MaxConcurrentDownloads = 17 },
			func(o image.Options) bool { return o.MaxConcurrentDownloads == 17 }},
		"discard_unpacked_layers": {func(c *config.Config) { c.Images.DiscardUnpackedLayers = true },
			func(o image.Options) bool { return o.DiscardUnpackedLayers }},
	} {
		cfg := config.Default()
		if c.told(imageOptions(cfg, slog.New(slog.DiscardHandler))) {
			t.Errorf("%s is told by default", key)
		}
		c.set(&cfg)
		if !c.told(imageOptions(cfg, slog.New(slog.DiscardHandler))) {
			t.Errorf("%s is not told", key)
		}
	}
}
