package oci

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DefaultAppArmorProfile is the profile of containers that name none. The
// caller loads it before a container whose Result says DefaultAppArmor starts.
const DefaultAppArmorProfile = "cloister-default"

// appArmorProfile returns what the container asks for; nil means nothing.
func appArmorProfile(sc *runtimeapi.LinuxContainerSecurityContext) (*runtimeapi.SecurityProfile, error) {
	if p := sc.GetApparmor(); p != nil {
		return p, checkProfile("apparmor", p)
	}
	return namedProfile("apparmor_profile", sc.GetApparmorProfile()) //nolint:staticcheck // old kubelets send it
}

// setAppArmor names the profile. Asking for one on a kernel without AppArmor
// is an error; asking for none is not.
func (b *builder) setAppArmor() error {
	profile, err := appArmorProfile(b.sc)
	if err != nil {
		return err
	}
	if !b.in.Node.AppArmor {
		b.spec.Process.ApparmorProfile = ""
		if profile != nil && profile.GetProfileType() != runtimeapi.SecurityProfile_Unconfined {
			return impossible("apparmor profile", profile.GetProfileType().String(), "this kernel has no AppArmor; use Unconfined or another node")
		}
		return nil
	}
	switch profile.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		b.spec.Process.ApparmorProfile = ""
	case runtimeapi.SecurityProfile_Localhost:
		name := strings.TrimPrefix(profile.GetLocalhostRef(), profileLocalhost)
		loaded, err := appArmorLoaded(b.k.appArmorProfiles, name)
		if err != nil {
			return err
		}
		if !loaded {
			return impossible("apparmor profile", name, "the kernel has no such profile; load it with apparmor_parser on this node")
		}
		b.spec.Process.ApparmorProfile = name
	default: // RuntimeDefault, also when no profile is named
		if b.sc.GetPrivileged() {
			b.spec.Process.ApparmorProfile = ""
			return nil
		}
		b.spec.Process.ApparmorProfile = DefaultAppArmorProfile
		b.res.DefaultAppArmor = true
	}
	return nil
}

// appArmorLoaded looks for a profile in the kernel's list, whose lines have
// the form "name (mode)".
func appArmorLoaded(list, name string) (bool, error) {
	f, err := os.Open(list)
	if err != nil {
		return false, fmt.Errorf("look for AppArmor profile %s: %w", show(name), err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), name); ok && strings.HasPrefix(rest, " (") {
			return true, nil
		}
	}
	if err := lines.Err(); err != nil {
		return false, fmt.Errorf("look for AppArmor profile %s: %w", show(name), err)
	}
	return false, nil
}

var selinuxLevel = regexp.MustCompile(`^s\d(-s\d)?(:c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*)?$`)

func checkSELinux(o *runtimeapi.SELinuxOption) error {
	if l := o.GetLevel(); l != "" && !selinuxLevel.MatchString(l) {
		return invalid("level of selinux_options", l, `give a level such as "s0:c1,c2"`)
	}
	for _, f := range []named[string]{{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}} {
		if !printable(f.value) || strings.ContainsAny(f.value, ": \t") || len(f.value) > maxUserName {
			return invalid(f.field+" of selinux_options", f.value, "give one part of an SELinux context")
		}
	}
	return nil
}

// SELinuxLabels reserves the process and mount labels of a pod; both are empty
// where SELinux is off. The caller returns them with selinux.ReleaseLabel.
func SELinuxLabels(o *runtimeapi.SELinuxOption) (process, mount string, err error) {
	if err := checkSELinux(o); err != nil {
		return "", "", err
	}
	process, mount, err = label.InitLabels(labelOptions(o))
	if err != nil {
		return "", "", fmt.Errorf("make SELinux labels: %w", err)
	}
	return process, mount, nil
}

func labelOptions(o *runtimeapi.SELinuxOption) []string {
	var options []string
	for _, part := range []struct{ key, value string }{
		{"user:", o.GetUser()}, {"role:", o.GetRole()}, {"type:", o.GetType()}, {"level:", o.GetLevel()},
	} {
		if part.value != "" {
			options = append(options, part.key+part.value)
		}
	}
	return options
}

// setLabels gives the container its SELinux labels: its own, else the pod's.
// Where SELinux is off the request is void, as for every file on the node.
func (b *builder) setLabels() error {
	b.spec.Process.SelinuxLabel, b.spec.Linux.MountLabel = "", ""
	if !b.in.Node.SELinux {
		return nil
	}
	options := labelOptions(b.sc.GetSelinuxOptions())
	switch {
	case len(options) > 0:
	case b.sc.GetPrivileged():
		options = selinux.DisableSecOpt()
	case b.in.SandboxLabel != "":
		var err error
		if options, err = selinux.DupSecOpt(b.in.SandboxLabel); err != nil {
			return fmt.Errorf("take the pod's SELinux label %s: %w", show(b.in.SandboxLabel), err)
		}
	}
	process, mount, err := label.InitLabels(options)
	if err != nil {
		return fmt.Errorf("make SELinux labels: %w", err)
	}
	b.spec.Process.SelinuxLabel, b.spec.Linux.MountLabel = process, mount
	return nil
}
