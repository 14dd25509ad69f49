package cri

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxID is above every id and short name that anybody makes.
	maxID = 255
	// maxImage bounds an image reference: a registry host, a name, a tag and a
	// digest with room to spare.
	maxImage = 1024
	// maxList bounds lists and label selectors of requests.
	maxList = 10000
	// maxSeconds is the longest time-out that a time.Duration holds.
	maxSeconds = int64(math.MaxInt64 / time.Second)
)

// check refuses requests whose ids, names or numbers cannot be what they say
// they are. Configurations of pods and containers are checked where they are
// used, in full; here only that they exist.
func check(req any) error {
	switch r := req.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		return first(sandboxConfig("config", r.GetConfig()), handlerName(r.GetRuntimeHandler()))
	case *runtimeapi.CreateContainerRequest:
		return first(id("pod_sandbox_id", r.GetPodSandboxId()), containerConfig(r.GetConfig()))
	case *runtimeapi.StopContainerRequest:
		return first(id("container_id", r.GetContainerId()), timeout(r.GetTimeout()))
	case *runtimeapi.ExecSyncRequest:
		return first(id("container_id", r.GetContainerId()), command(r.GetCmd()), timeout(r.GetTimeout()))
	case *runtimeapi.ExecRequest:
		return first(id("container_id", r.GetContainerId()), command(r.GetCmd()))
	case *runtimeapi.PortForwardRequest:
		return first(id("pod_sandbox_id", r.GetPodSandboxId()), count("port", len(r.GetPort())))
	case *runtimeapi.UpdateContainerResourcesRequest:
		return first(id("container_id", r.GetContainerId()), present("linux", r.GetLinux() != nil))
	case *runtimeapi.UpdateRuntimeConfigRequest:
		return podCIDR(r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr())
	case *runtimeapi.PullImageRequest:
		return pull(r)
	case interface{ GetImage() *runtimeapi.ImageSpec }: // ImageStatus, RemoveImage
		return imageSpec(r.GetImage())
	case interface{ GetContainerId() string }:
		return id("container_id", r.GetContainerId())
	case interface{ GetPodSandboxId() string }:
		return id("pod_sandbox_id", r.GetPodSandboxId())
	}
	return filter(req)
}

// filter checks the filters of lists. An unset field filters nothing.
func filter(req any) error {
	switch r := req.(type) {
	case interface {
		GetFilter() *runtimeapi.PodSandboxFilter
	}:
		f := r.GetFilter()
		return first(optionalID("id", f.GetId()), state(f.GetState() != nil, f.GetState().GetState(), runtimeapi.PodSandboxState_name), selector(f.GetLabelSelector()))
	case interface {
		GetFilter() *runtimeapi.ContainerFilter
	}:
		f := r.GetFilter()
		return first(optionalID("id", f.GetId()), optionalID("pod_sandbox_id", f.GetPodSandboxId()),
			state(f.GetState() != nil, f.GetState().GetState(), runtimeapi.ContainerState_name), selector(f.GetLabelSelector()))
	case interface {
		GetFilter() *runtimeapi.ContainerStatsFilter
	}:
		f := r.GetFilter()
		return first(optionalID("id", f.GetId()), optionalID("pod_sandbox_id", f.GetPodSandboxId()), selector(f.GetLabelSelector()))
	case interface {
		GetFilter() *runtimeapi.PodSandboxStatsFilter
	}:
		return first(optionalID("id", r.GetFilter().GetId()), selector(r.GetFilter().GetLabelSelector()))
	case interface {
		GetFilter() *runtimeapi.ImageFilter
	}:
		if r.GetFilter().GetImage().GetImage() == "" {
			return nil
		}
		return imageSpec(r.GetFilter().GetImage())
	}
	return nil
}

// first is the first error of a list of checks.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func present(field string, is bool) error {
	if !is {
		return invalid("%s is missing, set it", field)
	}
	return nil
}

func count(field string, n int) error {
	if n > maxList {
		return invalid("%s has %d entries, at most %d are supported", field, n, maxList)
	}
	return nil
}

func id(field, value string) error {
	if value == "" {
		return invalid("%s is missing, set it", field)
	}
	if len(value) > maxID {
		return invalid("%s %.40q… has %d bytes, ids have at most %d", field, value, len(value), maxID)
	}
	for _, c := range []byte(value) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && c != '-' && c != '_' && c != '.' {
			return invalid("%s %.80q is not an id: letters, digits, '-', '_' and '.' only", field, value)
		}
	}
	if strings.Trim(value, ".") == "" || strings.Contains(value, "..") {
		return invalid("%s %.80q is not an id", field, value)
	}
	return nil
}

func optionalID(field, value string) error {
	if value == "" {
		return nil
	}
	return id(field+" of the filter", value)
}

// handlerName takes every name that a configuration table can have; "" is the
// default handler.
func handlerName(name string) error {
	if name == "" {
		return nil
	}
	return id("runtime_handler", name)
}

// text refuses what breaks lines, terminals and C strings.
func text(field, value string, most int) error {
	switch {
	case len(value) > most:
		return invalid("%s %.40q… has %d bytes, at most %d are supported", field, value, len(value), most)
	case !utf8.ValidString(value):
		return invalid("%s %.80q is not UTF-8", field, value)
	case strings.ContainsFunc(value, unicode.IsControl):
		return invalid("%s %.80q holds control characters", field, value)
	}
	return nil
}

func name(field, value string) error {
	if value == "." || value == ".." || strings.Contains(value, "/") {
		return invalid("%s %.80q must not be a path", field, value)
	}
	return text(field, value, maxID)
}

func sandboxConfig(field string, c *runtimeapi.PodSandboxConfig) error {
	if c == nil {
		return invalid("%s is missing, set it", field)
	}
	m := c.GetMetadata()
	if m == nil {
		return invalid("%s.metadata is missing, set it", field)
	}
	return first(present(field+".metadata.name", m.GetName() != ""), name(field+".metadata.name", m.GetName()),
		name(field+".metadata.namespace", m.GetNamespace()), name(field+".metadata.uid", m.GetUid()))
}

func containerConfig(c *runtimeapi.ContainerConfig) error {
	if c == nil {
		return invalid("config is missing, set it")
	}
	if c.GetMetadata() == nil {
		return invalid("config.metadata is missing, set it")
	}
	if err := first(present("config.metadata.name", c.GetMetadata().GetName() != ""), name("config.metadata.name", c.GetMetadata().GetName())); err != nil {
		return err
	}
	if err := imageSpec(c.GetImage()); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

func imageSpec(spec *runtimeapi.ImageSpec) error {
	if spec.GetImage() == "" {
		return invalid("image is missing, set image.image to a name or an ID")
	}
	return first(text("image", spec.GetImage(), maxImage), handlerName(spec.GetRuntimeHandler()))
}

// pull names no field of the credentials with its value.
func pull(r *runtimeapi.PullImageRequest) error {
	if err := imageSpec(r.GetImage()); err != nil {
		return err
	}
	a := r.GetAuth()
	for _, v := range []string{a.GetUsername(), a.GetPassword(), a.GetAuth(), a.GetServerAddress(), a.GetIdentityToken(), a.GetRegistryToken()} {
		if len(v) > 1<<20 || strings.ContainsAny(v, "\r\n\x00") {
			return invalid("auth holds a line break or is longer than 1 MiB")
		}
	}
	return nil
}

func command(cmd []string) error {
	if len(cmd) == 0 {
		return invalid("cmd is missing, set it")
	}
	for i, arg := range cmd {
		if strings.Contains(arg, "\x00") {
			return invalid("cmd[%d] holds a NUL byte, which no program can be given", i)
		}
	}
	return nil
}

func timeout(seconds int64) error {
	if seconds < 0 {
		return invalid("timeout %d is negative, give seconds or 0", seconds)
	}
	return nil
}

// seconds is a checked time-out; one beyond the representable is for ever.
func seconds(n int64) time.Duration {
	return time.Duration(min(n, maxSeconds)) * time.Second
}

func state[E ~int32](set bool, value E, names map[int32]string) error {
	if _, ok := names[int32(value)]; set && !ok {
		return invalid("state %d of the filter is unknown", int32(value))
	}
	return nil
}

func selector(labels map[string]string) error { return count("label_selector", len(labels)) }

// podCIDR takes what kubelet sends: nothing, one range, or one of each family.
func podCIDR(value string) error {
	if value == "" {
		return nil
	}
	for cidr := range strings.SplitSeq(value, ",") {
		if _, err := netip.ParsePrefix(strings.TrimSpace(cidr)); err != nil {
			return invalid("pod_cidr %.80q: give ranges like 10.88.0.0/16, separated by commas", value)
		}
	}
	return nil
}
