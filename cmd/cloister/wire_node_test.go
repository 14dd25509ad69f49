package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/selinux/go-selinux"

	"cloister.dev/internal/config"
	"cloister.dev/internal/oci"
)

func TestKeysReachTheNode(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	blockio := filepath.Join(t.TempDir(), "blockio.yaml")
	if err := os.WriteFile(blockio, []byte("Classes:\n  slow:\n    - Weight: 40\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plain := node(config.Default(), log)
	for key, c := range map[string]struct {
		set func(*config.Config)
		ok  func(oci.Node) bool
	}{
		"enable_selinux":         {func(c *config.Config) { c.Runtime.EnableSELinux = true }, func(n oci.Node) bool { return n.SELinux == selinux.GetEnabled() }},
		"disable_apparmor":       {func(c *config.Config) { c.Runtime.DisableAppArmor = true }, func(n oci.Node) bool { return !n.AppArmor }},
		"enable_cdi":             {func(c *config.Config) { c.Runtime.EnableCDI = false }, func(n oci.Node) bool { return len(n.CDISpecDirs) == 0 && len(plain.CDISpecDirs) == 2 }},
		"restrict_oom_score_adj": {func(c *config.Config) { c.Runtime.RestrictOOMScoreAdj = true }, func(n oci.Node) bool { return n.RestrictOOMScore && !plain.RestrictOOMScore }},
		"disable_cgroup":         {func(c *config.Config) { c.Cloister.DisableCgroup = true }, func(n oci.Node) bool { return n.CgroupDisabled && !plain.CgroupDisabled }},
		"cdi_annotations":        {func(c *config.Config) { c.Cloister.CDIAnnotations = true }, func(n oci.Node) bool { return n.TrustCDIAnnotations && !plain.TrustCDIAnnotations }},
		"selinux_category_range": {func(c *config.Config) { c.Runtime.SELinuxCategoryRange = 512 }, func(oci.Node) bool {
			return selinux.CategoryRange == 512 //nolint:staticcheck // there is no other way to read it
		}},
		"blockio_config_file": {func(c *config.Config) { c.Plugins.Tasks.BlockIOConfigFile = blockio }, func(n oci.Node) bool {
			return plain.Classes.BlockIO == nil && n.Classes.BlockIO != nil
		}},
		"ignore_rdt_not_enabled_errors": {func(c *config.Config) { c.Runtime.Containerd.IgnoreRDTNotEnabledErrors = true }, func(n oci.Node) bool {
			return n.Classes.IgnoreNoRDT && n.Classes.RDT == nil
		}},
	} {
		cfg := config.Default()
		c.set(&cfg)
		if n := node(cfg, log); !c.ok(n) {
			t.Errorf("%s: %+v", key, n)
		}
	}
	cfg := config.Default()
	cfg.Cloister.Handlers = map[string]config.HandlerLimits{"runc": {Ulimits: map[string]string{"nofile": "1:2"}}}
	if limits, err := rlimits(cfg, "runc"); err != nil || len(limits) != 1 || limits[0].Type != "RLIMIT_NOFILE" || limits[0].Hard != 2 {
		t.Errorf("ulimits: %v, %v", limits, err)
	}
}
