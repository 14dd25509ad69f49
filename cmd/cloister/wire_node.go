package main

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/apparmor"
	"github.com/containerd/containerd/v2/pkg/blockio"
	"github.com/containerd/containerd/v2/pkg/rdt"
	"github.com/containerd/containerd/v2/pkg/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"

	"cloister.dev/internal/config"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/osutil"
)

// node finds out what the machine is, and what of it the configuration lets
// containers have.
func node(cfg config.Config, log *slog.Logger) oci.Node {
	r := cfg.Runtime
	n := oci.Node{
		CgroupV2: osutil.CgroupV2(), Seccomp: seccomp.IsEnabled(),
		AppArmor:           apparmor.HostSupports() && !r.DisableAppArmor,
		SELinux:            r.EnableSELinux && selinux.GetEnabled(),
		SeccompProfileRoot: "/var/lib/kubelet/seccomp",
		RestrictOOMScore:   r.RestrictOOMScoreAdj, HugetlbTolerated: r.TolerateMissingHugetlbController,
		HugetlbDisabled:   r.DisableHugetlbController,
		DefaultSeccomp:    r.UnsetSeccompProfile,
		UnprivilegedPorts: r.EnableUnprivilegedPorts, UnprivilegedICMP: r.EnableUnprivilegedICMP,
		DeviceOwnership: r.DeviceOwnershipFromSecurityContext, TrustCDIAnnotations: cfg.Cloister.CDIAnnotations,
		CgroupDisabled: cfg.Cloister.DisableCgroup, DefaultProcMount: r.DisableProcMount,
		Classes: classes(cfg, log),
	}
	if r.EnableCDI {
		n.CDISpecDirs = r.CDISpecDirs
	}
	if b, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil {
		n.DaemonOOMScore, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	if c := r.SELinuxCategoryRange; c > 0 {
		if err := selinux.SetCategoryRange(uint32(c)); err != nil {
			log.Warn("SELinux categories stay at 1024", "selinux_category_range", c, "err", err)
		}
	}
	return n
}

// classes reads what defines the blockio and RDT classes. A node without them
// runs all containers but those that ask for a class.
func classes(cfg config.Config, log *slog.Logger) oci.Classes {
	t := cfg.Plugins.Tasks
	c := oci.Classes{IgnoreNoBlockIO: cfg.Runtime.Containerd.IgnoreBlockIONotEnabledErrors,
		IgnoreNoRDT: cfg.Runtime.Containerd.IgnoreRDTNotEnabledErrors}
	if err := blockio.SetConfig(t.BlockIOConfigFile); err != nil {
		log.Error("blockio classes are off", "file", t.BlockIOConfigFile, "err", err)
	} else if blockio.IsEnabled() {
		c.BlockIO = blockio.ClassNameToLinuxOCI
	}
	if err := rdt.SetConfig(t.RDTConfigFile); err != nil {
		log.Error("RDT classes are off", "file", t.RDTConfigFile, "err", err)
	} else if rdt.IsEnabled() {
		c.RDT = func(container string, annotations, podAnnotations map[string]string) error {
			_, err := rdt.ContainerClassFromAnnotations(container, annotations, podAnnotations)
			return err
		}
	}
	return c
}

// rlimits gives the limits of a handler's containers.
func rlimits(cfg config.Config, handler string) ([]specs.POSIXRlimit, error) {
	limits, err := cfg.Cloister.Handlers[handler].Rlimits()
	if err != nil {
		return nil, fmt.Errorf("ulimits of handler %q: %w", handler, err)
	}
	var all []specs.POSIXRlimit
	for _, l := range limits {
		all = append(all, specs.POSIXRlimit{Type: l.Type, Soft: l.Soft, Hard: l.Hard})
	}
	return all, nil
}
