package plugin

import (
	"fmt"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"cloister.dev/internal/tee"
)

// maxMessage is the longest message that kubelet takes: gRPC's default, which
// it does not raise.
const maxMessage = 4 << 20

// DefaultMaxDevices is the most units of one resource, as with the original
// plugin for TrustZone.
const DefaultMaxDevices = 220_000

// Field numbers of v1beta1.
const (
	listDevices    = 1
	deviceID       = 1
	deviceHealth   = 2
	deviceTopology = 3
	topologyNodes  = 1
	nodeID         = 1
)

// list is a ListAndWatchResponse in its encoded form. Encoding by hand spares
// 220,000 structures of which nothing but four megabytes of text remain.
type list []byte

// encode writes the units of a resource, the first most of them.
func encode(r tee.ResourceState, most int) list {
	b := make([]byte, 0, most*17)
	for at, p := range r.Parts {
		health := v1beta1.Unhealthy
		if r.Health[at].Healthy {
			health = v1beta1.Healthy
		}
		topology := encodeTopology(p.NUMA)
		for n := range p.Units {
			if most == 0 {
				return b
			}
			most--
			id := p.ID(n)
			b = protowire.AppendTag(b, listDevices, protowire.BytesType)
			b = protowire.AppendVarint(b, uint64(deviceSize(len(id), len(health), len(topology))))
			b = protowire.AppendTag(b, deviceID, protowire.BytesType)
			b = protowire.AppendString(b, id)
			b = protowire.AppendTag(b, deviceHealth, protowire.BytesType)
			b = protowire.AppendString(b, health)
			if topology != nil {
				b = protowire.AppendTag(b, deviceTopology, protowire.BytesType)
				b = protowire.AppendBytes(b, topology)
			}
		}
	}
	return b
}

func deviceSize(id, health, topology int) int {
	n := protowire.SizeTag(deviceID) + protowire.SizeBytes(id) + protowire.SizeTag(deviceHealth) + protowire.SizeBytes(health)
	if topology > 0 {
		n += protowire.SizeTag(deviceTopology) + protowire.SizeBytes(topology)
	}
	return n
}

func encodeTopology(numa []int64) []byte {
	var b []byte
	for _, n := range numa {
		var node []byte
		if n != 0 {
			node = protowire.AppendTag(node, nodeID, protowire.VarintType)
			node = protowire.AppendVarint(node, uint64(n))
		}
		b = protowire.AppendTag(b, topologyNodes, protowire.BytesType)
		b = protowire.AppendBytes(b, node)
	}
	return b
}

// fit gives how many units of a resource may be listed, and why no more. It
// reckons with all of them unhealthy: losing the device must not make the list
// too long for kubelet to be told.
func fit(r tee.Resource, maxDevices int) (most int, why string) {
	size := 0
	for _, p := range r.Parts {
		topology := len(encodeTopology(p.NUMA))
		for n := range p.Units {
			if most == maxDevices {
				return most, fmt.Sprintf("max_devices is %d", maxDevices)
			}
			d := deviceSize(len(p.ID(n)), len(v1beta1.Unhealthy), topology)
			size += protowire.SizeTag(listDevices) + protowire.SizeBytes(d)
			if size > maxMessage {
				return most, fmt.Sprintf("kubelet takes no list longer than %d bytes", maxMessage)
			}
			most++
		}
	}
	return most, ""
}

// codec is protobuf, but for lists that are encoded already.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	if l, ok := v.(list); ok {
		return mem.BufferSlice{mem.SliceBuffer(l)}, nil
	}
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("a %T is no protobuf message", v)
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("a %T is no protobuf message", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return proto.Unmarshal(buf.ReadOnlyData(), m)
}
