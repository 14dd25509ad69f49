package oci

import (
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxStrings bounds command, args and variables; execve has its own limit
	// on their bytes.
	maxStrings = 1 << 17
	// maxReference is above what any registry takes.
	maxReference = 4096
)

// ValidateContainer checks the shape of a container's configuration and that
// it fits its pod's.
func ValidateContainer(cfg *runtimeapi.ContainerConfig, sandbox *runtimeapi.PodSandboxConfig, node Node) error {
	if cfg == nil {
		return missing("config of the container")
	}
	if sandbox == nil || sandbox.GetMetadata() == nil {
		return missing("sandbox_config with metadata")
	}
	if cfg.GetMetadata() == nil || cfg.GetMetadata().GetName() == "" {
		return missing("metadata with a name of the container")
	}
	if err := checkName("name of the container", cfg.GetMetadata().GetName()); err != nil {
		return err
	}
	if image := cfg.GetImage().GetImage(); image == "" {
		return missing("image of the container")
	} else if len(image) > maxReference || !printable(image) {
		return invalid("image of the container", image, "it is not an image reference")
	}
	if _, err := LogPath(cfg, sandbox); err != nil {
		return err
	}
	for _, check := range []func() error{
		func() error { return checkMap("labels of the container", cfg.GetLabels()) },
		func() error { return checkMap("annotations of the container", cfg.GetAnnotations()) },
		func() error { return checkCommand(cfg) },
		func() error { return checkMounts(cfg.GetMounts()) },
		func() error { return checkDevices(cfg) },
		func() error { return checkSignal(cfg.GetStopSignal()) },
		func() error { return checkResources(cfg.GetLinux().GetResources()) },
		func() error { return checkSecurity(cfg.GetLinux().GetSecurityContext(), sandbox, node) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func checkCommand(cfg *runtimeapi.ContainerConfig) error {
	if n := len(cfg.GetCommand()) + len(cfg.GetArgs()) + len(cfg.GetEnvs()); n > maxStrings {
		return invalid("number of arguments and variables", n, "too many")
	}
	for _, e := range cfg.GetEnvs() {
		if e.GetKey() == "" {
			return missing("key of a variable in envs")
		}
		if strings.ContainsAny(e.GetKey(), "=\x00") || !utf8.ValidString(e.GetKey()) {
			return invalid("key of envs", e.GetKey(), `"=", NUL bytes and invalid UTF-8 are not allowed`)
		}
		// The value may be a secret, so an error does not repeat it.
		if value := string(e.GetValue()); strings.ContainsRune(value, 0) || !utf8.ValidString(value) {
			return invalid("variable in envs", e.GetKey(), "its value has NUL bytes or invalid UTF-8; pass a file instead")
		}
	}
	return nil
}

// mountOptions may be added to a bind mount; others would undo what typed
// fields decide.
func mountOptions() []string {
	return []string{"noexec", "nosuid", "nodev", "exec", "suid", "dev", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow"}
}

func checkMounts(mounts []*runtimeapi.Mount) error {
	if len(mounts) > maxRepeated {
		return invalid("number of mounts", len(mounts), "too many")
	}
	seen := map[string]bool{}
	for _, m := range mounts {
		if m == nil {
			return missing("an entry of mounts")
		}
		if err := checkMount(m); err != nil {
			return err
		}
		at := inContainer(m.GetContainerPath())
		if seen[at] {
			return invalid("container_path of mounts", m.GetContainerPath(), "two mounts have it; remove one")
		}
		seen[at] = true
	}
	return nil
}

func checkMount(m *runtimeapi.Mount) error {
	if m.GetContainerPath() == "" {
		return missing("container_path of a mount")
	}
	if err := checkPath("container_path of mount", m.GetContainerPath()); err != nil {
		return err
	}
	if inContainer(m.GetContainerPath()) == "/" {
		return invalid("container_path of mount", m.GetContainerPath(), "a mount cannot replace the root file system")
	}
	if err := checkMountSource(m); err != nil {
		return err
	}
	if _, ok := runtimeapi.MountPropagation_name[int32(m.GetPropagation())]; !ok {
		return invalid("propagation of mount", int32(m.GetPropagation()), "give PRIVATE, HOST_TO_CONTAINER or BIDIRECTIONAL")
	}
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid("recursive_read_only of mount", m.GetContainerPath(), "it needs readonly beside it")
		}
		if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			return invalid("recursive_read_only of mount", m.GetContainerPath(), "it needs PRIVATE propagation")
		}
	}
	for _, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions(), o) {
			return invalid("mount_options", o, "give one or more of "+strings.Join(mountOptions(), ", "))
		}
	}
	if err := checkMapping("uidMappings of mount", m.GetUidMappings(), false); err != nil {
		return err
	}
	return checkMapping("gidMappings of mount", m.GetGidMappings(), false)
}

func checkMountSource(m *runtimeapi.Mount) error {
	if image := m.GetImage().GetImage(); image != "" {
		if m.GetHostPath() != "" {
			return invalid("host_path of mount", m.GetHostPath(), "a mount has either host_path or image")
		}
		if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			return invalid("propagation of mount", m.GetPropagation().String(), "an image has PRIVATE propagation only")
		}
		return checkPath("image_sub_path of mount", m.GetImageSubPath())
	}
	if m.GetImageSubPath() != "" {
		return invalid("image_sub_path of mount", m.GetImageSubPath(), "it goes with image only")
	}
	if m.GetHostPath() == "" {
		return missing("host_path or image of mount " + show(m.GetContainerPath()))
	}
	if !filepath.IsAbs(m.GetHostPath()) {
		return invalid("host_path of mount", m.GetHostPath(), "give an absolute path")
	}
	return checkPath("host_path of mount", m.GetHostPath())
}

func checkSecurity(sc *runtimeapi.LinuxContainerSecurityContext, sandbox *runtimeapi.PodSandboxConfig, node Node) error {
	pod := sandbox.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() && !pod.GetPrivileged() {
		return invalid("privileged", true, "the pod sandbox was made without privileged containers; make it with privileged set")
	}
	if err := checkContainerUser(sc); err != nil {
		return err
	}
	if err := checkCapabilities(sc.GetCapabilities()); err != nil {
		return err
	}
	if _, err := seccompProfile(sc, node); err != nil {
		return err
	}
	if _, err := appArmorProfile(sc); err != nil {
		return err
	}
	if err := checkSELinux(sc.GetSelinuxOptions()); err != nil {
		return err
	}
	for _, f := range []named[[]string]{{"masked_paths", sc.GetMaskedPaths()}, {"readonly_paths", sc.GetReadonlyPaths()}} {
		if len(f.value) > maxRepeated {
			return invalid("number of "+f.field, len(f.value), "too many")
		}
		for _, p := range f.value {
			if !filepath.IsAbs(p) {
				return invalid(f.field, p, "give absolute paths")
			}
			if err := checkPath(f.field, p); err != nil {
				return err
			}
		}
	}
	if err := checkNamespaces(sc.GetNamespaceOptions(), false); err != nil {
		return err
	}
	own, pods := sc.GetNamespaceOptions().GetUsernsOptions(), pod.GetNamespaceOptions().GetUsernsOptions()
	if !sameUserNamespace(own, pods) {
		return invalid("userns_options of the container", own.GetMode().String(), "they differ from the pod's; give the pod's")
	}
	return nil
}

// sameUserNamespace treats absence and NODE alike: both are the node's.
func sameUserNamespace(a, b *runtimeapi.UserNamespace) bool {
	node := func(u *runtimeapi.UserNamespace) bool {
		return u == nil || u.GetMode() == runtimeapi.NamespaceMode_NODE
	}
	if node(a) || node(b) {
		return node(a) == node(b)
	}
	return proto.Equal(a, b)
}

func checkContainerUser(sc *runtimeapi.LinuxContainerSecurityContext) error {
	name := sc.GetRunAsUsername()
	if name != "" && sc.GetRunAsUser() != nil {
		return invalid("run_as_username", name, "only one of run_as_user and run_as_username may be set")
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && name == "" {
		return invalid("run_as_group", sc.GetRunAsGroup().GetValue(), "it needs run_as_user or run_as_username beside it")
	}
	if len(name) > maxUserName || !printable(name) || strings.Contains(name, ":") {
		return invalid("run_as_username", name, "give a name of the image's /etc/passwd")
	}
	if _, _, err := parseID("run_as_username", name); err != nil {
		return err
	}
	if _, ok := runtimeapi.SupplementalGroupsPolicy_name[int32(sc.GetSupplementalGroupsPolicy())]; !ok {
		return invalid("supplemental_groups_policy", int32(sc.GetSupplementalGroupsPolicy()), "give Merge or Strict")
	}
	return checkIDs(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups())
}
