package pod

import (
	"os"
	"path/filepath"

	"cloister.dev/internal/oci"
)

// dropCgroupParent removes the cgroup that holds those of this daemon alone,
// when no container is left in it. The kernel refuses to remove one in use.
func (s *Service) dropCgroupParent() {
	if s.o.CgroupParent == "" || s.o.CgroupParent == oci.DefaultCgroup {
		return
	}
	for _, h := range cgroupRoot().hierarchies() {
		_ = os.Remove(filepath.Join(h, s.o.CgroupParent))
	}
}
