package plugin

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"cloister.dev/internal/tee"
)

func state(healthy bool, parts ...tee.Part) tee.ResourceState {
	s := tee.ResourceState{Resource: tee.Resource{Name: ram, Model: tee.Memory, Parts: parts}}
	for _, p := range parts {
		s.Health = append(s.Health, tee.Health{Part: p.Key, Healthy: healthy})
	}
	return s
}

// What is encoded by hand is what the library would have encoded.
func TestEncode(t *testing.T) {
	s := state(true, tee.Part{Key: "a", Units: 40, NUMA: []int64{0}}, tee.Part{Key: "b", Units: 3, NUMA: []int64{1, 300}}, tee.Part{Key: "c", Units: 2})
	s.Health[1].Healthy = false
	want := &v1beta1.ListAndWatchResponse{}
	for at, p := range s.Parts {
		for n := range p.Units {
			d := &v1beta1.Device{ID: p.ID(n), Health: v1beta1.Healthy}
			if !s.Health[at].Healthy {
				d.Health = v1beta1.Unhealthy
			}
			for _, node := range p.NUMA {
				if d.Topology == nil {
					d.Topology = &v1beta1.TopologyInfo{}
				}
				d.Topology.Nodes = append(d.Topology.Nodes, &v1beta1.NUMANode{ID: node})
			}
			want.Devices = append(want.Devices, d)
		}
	}
	for _, most := range []int{45, 41, 0} {
		got := &v1beta1.ListAndWatchResponse{}
		if err := proto.Unmarshal(encode(s, most), got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, &v1beta1.ListAndWatchResponse{Devices: want.Devices[:most]}) {
			t.Errorf("%d units: %v", most, got)
		}
	}
}

// However large a resource is, kubelet can be told of it, healthy or not.
func TestFit(t *testing.T) {
	tests := []struct {
		name   string
		parts  []tee.Part
		max    int
		listed int
		why    bool
	}{
		{"the original's limit", []tee.Part{{Units: DefaultMaxDevices}}, DefaultMaxDevices, DefaultMaxDevices, false},
		{"above it", []tee.Part{{Units: DefaultMaxDevices + 1}}, DefaultMaxDevices, DefaultMaxDevices, true},
		{"bound by the message", []tee.Part{{Units: 1 << 20}}, 1 << 20, 223278, true},
		{"with NUMA nodes", []tee.Part{{Key: "node0", Units: 110_000, NUMA: []int64{0}}, {Key: "node1", Units: 110_000, NUMA: []int64{1}}}, DefaultMaxDevices, 0, true},
		{"nothing", []tee.Part{{}}, DefaultMaxDevices, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, healthy := range []bool{true, false} {
				s := state(healthy, tt.parts...)
				listed, why := fit(s.Resource, tt.max)
				if tt.listed != 0 && listed != tt.listed || (why != "") != tt.why {
					t.Errorf("fit: %d, %q", listed, why)
				}
				b := encode(s, listed)
				t.Logf("healthy %v: %d of %d units, %d bytes, %s", healthy, listed, s.Units(), len(b), why)
				if len(b) > maxMessage {
					t.Errorf("%d bytes do not reach kubelet", len(b))
				}
			}
		})
	}
}

func TestPrefer(t *testing.T) {
	r := tee.Resource{Name: ram, Parts: []tee.Part{{Key: "a", Units: 4}, {Key: "b", Units: 6}, {Key: "c", Units: 10}}}
	ids := func(part string, from, to int) []string {
		var all []string
		for n := from; n < to; n++ {
			all = append(all, fmt.Sprintf("%s.%d", part, n))
		}
		return all
	}
	all := slices.Concat(ids("a", 0, 4), ids("b", 0, 6), ids("c", 0, 10))
	tests := []struct {
		name            string
		available, must []string
		size            int
		want            []string
		bad             bool
	}{
		{"smallest that holds it", all, nil, 4, ids("a", 0, 4), false},
		{"next one", all, nil, 5, ids("b", 0, 5), false},
		{"beside what must be", all, []string{"c.9"}, 3, []string{"c.9", "c.0", "c.1"}, false},
		{"over two parts", all, nil, 12, slices.Concat(ids("c", 0, 10), ids("b", 0, 2)), false},
		{"only must", all, []string{"a.1"}, 1, []string{"a.1"}, false},
		{"more than there is", all, nil, 21, nil, true},
		{"less than must be", all, []string{"a.1", "a.2"}, 1, nil, true},
		{"strangers", []string{"x", "y"}, nil, 1, nil, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := prefer(r, tt.available, tt.must, tt.size)
			if (err != nil) != tt.bad || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}
