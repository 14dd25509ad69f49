package integration

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// mutation is a message with one field changed for the worse.
type mutation struct {
	name string
	m    proto.Message
}

// mutations gives copies of a message, each with one field, at any depth, set
// to one hostile value. A field that is unset counts as there.
func mutations(base proto.Message) []mutation {
	var all []mutation
	var walk func(path []protoreflect.FieldDescriptor, name string, d protoreflect.MessageDescriptor)
	walk = func(path []protoreflect.FieldDescriptor, name string, d protoreflect.MessageDescriptor) {
		if len(path) > 6 {
			return
		}
		for i := range d.Fields().Len() {
			f := d.Fields().Get(i)
			at := name + "." + string(f.Name())
			to := append(path[:len(path):len(path)], f)
			for j, set := range hostileValues(f) {
				m := proto.Clone(base)
				set(reach(m.ProtoReflect(), path), f)
				all = append(all, mutation{fmt.Sprintf("%s#%d", at, j), m})
			}
			if f.Message() != nil && !f.IsMap() {
				walk(to, at, f.Message())
			}
		}
	}
	walk(nil, string(base.ProtoReflect().Descriptor().Name()), base.ProtoReflect().Descriptor())
	return all
}

// reach goes down to the message at path, making what is missing on it.
func reach(m protoreflect.Message, path []protoreflect.FieldDescriptor) protoreflect.Message {
	for _, f := range path {
		if f.IsList() {
			l := m.Mutable(f).List()
			if l.Len() == 0 {
				l.AppendMutable()
			}
			m = l.Get(0).Message()
			continue
		}
		m = m.Mutable(f).Message()
	}
	return m
}

type setter func(protoreflect.Message, protoreflect.FieldDescriptor)

func hostileValues(f protoreflect.FieldDescriptor) []setter {
	var out []setter
	if f.IsMap() {
		if f.MapValue().Kind() != protoreflect.StringKind {
			return nil
		}
		for _, kv := range [][2]string{{"", ""}, {"../a", "x"}, {"a\nb", "c\nd"}, {strings.Repeat("k", 10000), "v"}, {"k", strings.Repeat("v", 1<<20)}, {"a\x00b", "\x00"}} {
			out = append(out, func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
				m.Mutable(f).Map().Set(protoreflect.ValueOfString(kv[0]).MapKey(), protoreflect.ValueOfString(kv[1]))
			})
		}
		return out
	}
	if f.IsList() {
		if f.Message() != nil {
			out = append(out,
				func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Mutable(f).List().AppendMutable() },
				func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
					for range 2000 {
						m.Mutable(f).List().AppendMutable()
					}
				})
			return out
		}
		for _, v := range scalars(f) {
			out = append(out, func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Mutable(f).List().Append(v) })
		}
		out = append(out, func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
			for range 5000 {
				m.Mutable(f).List().Append(scalars(f)[0])
			}
		})
		return out
	}
	if f.Message() != nil {
		return []setter{
			func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Clear(f) },
			func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
				m.Set(f, protoreflect.ValueOfMessage(m.NewField(f).Message()))
			},
		}
	}
	for _, v := range scalars(f) {
		out = append(out, func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Set(f, v) })
	}
	return out
}

func scalars(f protoreflect.FieldDescriptor) []protoreflect.Value {
	var vs []protoreflect.Value
	switch f.Kind() {
	case protoreflect.StringKind:
		for _, s := range []string{"", "/", "..", "../../../tmp/it-mutated", "/../../tmp/it-mutated", "a\nb", "a\x00b", "a\x1b[31mb", strings.Repeat("a", 10000), "/" + strings.Repeat("a/", 3000), "%s%n", "ünïcødé", " ", "-1", "99999999999999999999", "unix:///tmp/it-mutated", "a=b;c=d"} {
			vs = append(vs, protoreflect.ValueOfString(s))
		}
	case protoreflect.BytesKind:
		vs = append(vs, protoreflect.ValueOfBytes(nil), protoreflect.ValueOfBytes([]byte("a\x00b\nc")), protoreflect.ValueOfBytes(make([]byte, 1<<20)))
	case protoreflect.BoolKind:
		vs = append(vs, protoreflect.ValueOfBool(true), protoreflect.ValueOfBool(false))
	case protoreflect.EnumKind:
		for _, n := range []protoreflect.EnumNumber{-1, 0, 1, 2, 3, 999} {
			vs = append(vs, protoreflect.ValueOfEnum(n))
		}
	case protoreflect.Int32Kind:
		for _, n := range []int32{-1, 1, 65536, math.MinInt32, math.MaxInt32} {
			vs = append(vs, protoreflect.ValueOfInt32(n))
		}
	case protoreflect.Uint32Kind:
		for _, n := range []uint32{0, 1, math.MaxUint32} {
			vs = append(vs, protoreflect.ValueOfUint32(n))
		}
	case protoreflect.Int64Kind:
		for _, n := range []int64{-1, 1, 1 << 32, math.MinInt64, math.MaxInt64} {
			vs = append(vs, protoreflect.ValueOfInt64(n))
		}
	case protoreflect.Uint64Kind:
		for _, n := range []uint64{0, 1, math.MaxUint64} {
			vs = append(vs, protoreflect.ValueOfUint64(n))
		}
	case protoreflect.DoubleKind:
		vs = append(vs, protoreflect.ValueOfFloat64(math.NaN()), protoreflect.ValueOfFloat64(math.Inf(1)))
	}
	return vs
}

// some picks what a test has time for: with MUTATE=all everything.
func some(all []mutation, step int) []mutation {
	if os.Getenv("MUTATE") == "all" {
		return all
	}
	var picked []mutation
	for i := 0; i < len(all); i += step {
		picked = append(picked, all[i])
	}
	return picked
}

// sane checks what a call with a hostile request answered: in time, and with
// an error that blames the request.
func sane(t *testing.T, what string, began time.Time, err error, also ...codes.Code) {
	t.Helper()
	st, _ := status.FromError(err)
	fine := append([]codes.Code{codes.OK, codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.AlreadyExists,
		codes.OutOfRange, codes.ResourceExhausted, codes.PermissionDenied, codes.Unimplemented}, also...)
	took := time.Since(began)
	if !slices.Contains(fine, st.Code()) || took > 5*time.Second || len(st.Message()) > 5000 || strings.ContainsAny(st.Message(), "\n\x00\x1b") {
		t.Errorf("%s: %v after %v: %.400q", what, st.Code(), took, st.Message())
	}
}

// No value of any field of a container's configuration makes the daemon fail
// otherwise than the one call, or leaves anything.
func TestMutatedContainers(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	p := runPod(t, n)
	check := noLeak(t, n)
	for i, mu := range some(mutations(containerConfig(busybox, []string{"sleep", "1000"})), 2) {
		began := time.Now()
		c, err := p.tryCreate(t.Context(), mu.m.(*cri.ContainerConfig))
		sane(t, mu.name+": create", began, err)
		if err != nil {
			continue
		}
		if i%4 == 0 || os.Getenv("MUTATE") == "all" {
			began = time.Now()
			sane(t, mu.name+": start", began, c.tryStart())
			c.status()
		}
		c.remove()
	}
	check()
}

// The same holds for the configuration of a pod.
func TestMutatedPods(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	for _, mu := range some(mutations(podConfig(n, t)), 5) {
		cfg := mu.m.(*cri.PodSandboxConfig)
		began := time.Now()
		r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: cfg})
		sane(t, mu.name, began, err)
		if err != nil {
			continue
		}
		p := &pod{t, n, r.PodSandboxId, cfg}
		p.status()
		p.remove()
	}
	check()
}

// And for the other requests, while a container runs that they may be about.
func TestMutatedRequests(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	p := runPod(t, n)
	c := p.idle()
	ctx := t.Context()
	r, i := n.Runtime, n.Image
	for _, base := range []struct {
		m    proto.Message
		call func(proto.Message) error
		also []codes.Code
	}{
		{&cri.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: &cri.LinuxContainerResources{}}, func(m proto.Message) error {
			return second(r.UpdateContainerResources(ctx, m.(*cri.UpdateContainerResourcesRequest)))
		}, []codes.Code{codes.Internal, codes.Unknown}}, // what the kernel refuses
		{&cri.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id}, func(m proto.Message) error {
			return second(r.UpdatePodSandboxResources(ctx, m.(*cri.UpdatePodSandboxResourcesRequest)))
		}, nil},
		{&cri.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"true"}, Timeout: 5}, func(m proto.Message) error { return second(r.ExecSync(ctx, m.(*cri.ExecSyncRequest))) }, nil},
		{&cri.ExecRequest{ContainerId: c.id, Cmd: []string{"true"}, Stdout: true}, func(m proto.Message) error { return second(r.Exec(ctx, m.(*cri.ExecRequest))) }, nil},
		{&cri.AttachRequest{ContainerId: c.id, Stdout: true}, func(m proto.Message) error { return second(r.Attach(ctx, m.(*cri.AttachRequest))) }, nil},
		{&cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{80}}, func(m proto.Message) error { return second(r.PortForward(ctx, m.(*cri.PortForwardRequest))) }, nil},
		{&cri.ListContainersRequest{Filter: &cri.ContainerFilter{}}, func(m proto.Message) error { return second(r.ListContainers(ctx, m.(*cri.ListContainersRequest))) }, nil},
		{&cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{}}, func(m proto.Message) error { return second(r.ListPodSandbox(ctx, m.(*cri.ListPodSandboxRequest))) }, nil},
		{&cri.ListContainerStatsRequest{Filter: &cri.ContainerStatsFilter{}}, func(m proto.Message) error {
			return second(r.ListContainerStats(ctx, m.(*cri.ListContainerStatsRequest)))
		}, nil},
		{&cri.ListPodSandboxStatsRequest{Filter: &cri.PodSandboxStatsFilter{}}, func(m proto.Message) error {
			return second(r.ListPodSandboxStats(ctx, m.(*cri.ListPodSandboxStatsRequest)))
		}, nil},
		{&cri.ListImagesRequest{Filter: &cri.ImageFilter{}}, func(m proto.Message) error { return second(i.ListImages(ctx, m.(*cri.ListImagesRequest))) }, nil},
		{&cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: busybox}}, func(m proto.Message) error { return second(i.ImageStatus(ctx, m.(*cri.ImageStatusRequest))) }, nil},
		{&cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{}}}, func(m proto.Message) error {
			return second(r.UpdateRuntimeConfig(ctx, m.(*cri.UpdateRuntimeConfigRequest)))
		}, nil},
		{&cri.CheckpointContainerRequest{ContainerId: c.id, Location: "/tmp/it-checkpoint"}, func(m proto.Message) error {
			return second(r.CheckpointContainer(ctx, m.(*cri.CheckpointContainerRequest)))
		}, nil},
		{&cri.StopContainerRequest{ContainerId: strings.Repeat("f", 64)}, func(m proto.Message) error { return second(r.StopContainer(ctx, m.(*cri.StopContainerRequest))) }, nil},
		{&cri.PullImageRequest{Image: &cri.ImageSpec{Image: busybox}}, func(m proto.Message) error { return second(i.PullImage(ctx, m.(*cri.PullImageRequest))) },
			[]codes.Code{codes.Unavailable}}, // a registry that is not there
	} {
		for _, mu := range some(mutations(base.m), 2) {
			began := time.Now()
			sane(t, mu.name, began, base.call(mu.m), base.also...)
		}
	}
	if out := c.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
}
