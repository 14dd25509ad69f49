package oci

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/osutil"
)

const (
	// maxSeccompProfile is four times the largest profile in the field.
	maxSeccompProfile = 1 << 20

	profileDefault    = "runtime/default"
	profileDocker     = "docker/default"
	profileUnconfined = "unconfined"
	profileLocalhost  = "localhost/"
)

// seccompProfile returns what the container asks for: the typed field, else
// the deprecated string, else the node's default; nil means none was named.
func seccompProfile(sc *runtimeapi.LinuxContainerSecurityContext, node Node) (*runtimeapi.SecurityProfile, error) {
	if p := sc.GetSeccomp(); p != nil {
		return p, checkProfile("seccomp", p)
	}
	name := sc.GetSeccompProfilePath() //nolint:staticcheck // old kubelets send it
	if name == "" {
		name = node.DefaultSeccomp
	}
	return namedProfile("seccomp_profile_path", name)
}

// namedProfile reads the string form of a profile.
func namedProfile(field, name string) (*runtimeapi.SecurityProfile, error) {
	switch {
	case name == "":
		return nil, nil
	case name == profileDefault || name == profileDocker:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case name == profileUnconfined:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(name, profileLocalhost):
		p := &runtimeapi.SecurityProfile{
			ProfileType:  runtimeapi.SecurityProfile_Localhost,
			LocalhostRef: strings.TrimPrefix(name, profileLocalhost),
		}
		return p, checkProfile(field, p)
	}
	return nil, invalid(field, name, "give runtime/default, unconfined or localhost/NAME")
}

func checkProfile(field string, p *runtimeapi.SecurityProfile) error {
	switch p.GetProfileType() {
	case runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined:
		if p.GetLocalhostRef() != "" {
			return invalid("localhost_ref of "+field, p.GetLocalhostRef(), "it goes with profile type Localhost only")
		}
	case runtimeapi.SecurityProfile_Localhost:
		if p.GetLocalhostRef() == "" {
			return missing("localhost_ref of " + field)
		}
		return checkPath("localhost_ref of "+field, p.GetLocalhostRef())
	default:
		return invalid("profile_type of "+field, int32(p.GetProfileType()), "give RuntimeDefault, Unconfined or Localhost")
	}
	return nil
}

// setSeccomp comes after the capabilities: the default profile allows what
// they make useful.
func (b *builder) setSeccomp() error {
	profile, err := seccompProfile(b.sc, b.in.Node)
	if err != nil {
		return err
	}
	if b.sc.GetPrivileged() || (profile != nil && profile.GetProfileType() == runtimeapi.SecurityProfile_Unconfined) {
		b.spec.Linux.Seccomp = nil
		return nil
	}
	if profile == nil {
		return nil // a base spec's filter stays
	}
	if !b.in.Node.Seccomp {
		return impossible("seccomp profile", profile.GetProfileType().String(), "this kernel has no seccomp; use Unconfined")
	}
	if profile.GetProfileType() == runtimeapi.SecurityProfile_RuntimeDefault {
		b.spec.Linux.Seccomp = seccomp.DefaultProfile(b.spec)
		return nil
	}
	b.spec.Linux.Seccomp, err = readSeccompProfile(b.in.Node.SeccompProfileRoot, profile.GetLocalhostRef())
	return err
}

// readSeccompProfile reads a profile of the node. kubelet sends absolute
// paths; relative ones lie beneath root and cannot leave it.
func readSeccompProfile(root, ref string) (*specs.LinuxSeccomp, error) {
	ref = strings.TrimPrefix(ref, profileLocalhost)
	var f *os.File
	var err error
	if filepath.IsAbs(ref) {
		f, err = os.OpenFile(ref, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	} else if root == "" {
		return nil, impossible("seccomp profile", ref, "this node has no folder for seccomp profiles; give an absolute path")
	} else {
		f, err = osutil.OpenInRoot(root, ref, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	}
	if err != nil {
		return nil, impossible("seccomp profile", ref, "cannot open it: "+err.Error()+"; put the profile on this node")
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, impossible("seccomp profile", ref, "it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSeccompProfile+1))
	if err != nil {
		return nil, fmt.Errorf("read seccomp profile %s: %w", show(ref), err)
	}
	if len(data) > maxSeccompProfile {
		return nil, impossible("seccomp profile", ref, "it has more than 1 MiB")
	}
	profile, err := parseSeccomp(data)
	if err != nil {
		return nil, impossible("seccomp profile", ref, err.Error())
	}
	return profile, nil
}

// parseSeccomp reads a profile in the form of the runtime specification. A
// runtime would take an unknown or absent default action for one that it
// chooses itself, so the actions are checked.
func parseSeccomp(data []byte) (*specs.LinuxSeccomp, error) {
	var p specs.LinuxSeccomp
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("it is not a seccomp profile in JSON: %w", err)
	}
	actions := []specs.LinuxSeccompAction{
		specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno,
		specs.ActTrace, specs.ActAllow, specs.ActLog, specs.ActNotify,
	}
	if !slices.Contains(actions, p.DefaultAction) {
		return nil, fmt.Errorf("defaultAction is %s; give one of SCMP_ACT_ERRNO, SCMP_ACT_ALLOW, …", show(string(p.DefaultAction)))
	}
	for i, call := range p.Syscalls {
		if !slices.Contains(actions, call.Action) {
			return nil, fmt.Errorf("action of syscalls[%d] is %s; give one of SCMP_ACT_ERRNO, SCMP_ACT_ALLOW, …", i, show(string(call.Action)))
		}
		if len(call.Names) == 0 {
			return nil, fmt.Errorf("syscalls[%d] has no names", i)
		}
	}
	return &p, nil
}
