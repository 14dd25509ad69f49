package cri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/pod"
)

func TestSandboxFilters(t *testing.T) {
	c := serve(t, &fakePods{sandboxes: someSandboxes()}, &fakeImages{}, nil)
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	for name, tc := range map[string]struct {
		filter *runtimeapi.PodSandboxFilter
		want   []string
	}{
		"none":             {nil, []string{"aaaa1", "bbbb2", "cccc3"}},
		"state":            {&runtimeapi.PodSandboxFilter{State: ready}, []string{"aaaa1", "cccc3"}},
		"id":               {&runtimeapi.PodSandboxFilter{Id: "bbbb2"}, []string{"bbbb2"}},
		"short id":         {&runtimeapi.PodSandboxFilter{Id: "bb"}, []string{"bbbb2"}},
		"unknown id":       {&runtimeapi.PodSandboxFilter{Id: "zz"}, nil},
		"label":            {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "a"}}, []string{"aaaa1", "bbbb2"}},
		"labels":           {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "a", "tier": "front"}}, []string{"aaaa1"}},
		"empty label":      {&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"none": ""}}, nil},
		"label and state":  {&runtimeapi.PodSandboxFilter{State: ready, LabelSelector: map[string]string{"app": "a"}}, []string{"aaaa1"}},
		"id, other state":  {&runtimeapi.PodSandboxFilter{Id: "bbbb2", State: ready}, nil},
		"id, other labels": {&runtimeapi.PodSandboxFilter{Id: "cccc3", LabelSelector: map[string]string{"app": "a"}}, nil},
	} {
		resp, err := c.ListPodSandbox(within(t), &runtimeapi.ListPodSandboxRequest{Filter: tc.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got, streamed []string
		for _, sb := range resp.Items {
			got = append(got, sb.Id)
		}
		for _, m := range drain(t, func() (grpc.ServerStreamingClient[runtimeapi.StreamPodSandboxesResponse], error) {
			return c.StreamPodSandboxes(within(t), &runtimeapi.StreamPodSandboxesRequest{Filter: tc.filter})
		}) {
			for _, sb := range m.PodSandboxes {
				streamed = append(streamed, sb.Id)
			}
		}
		if !slices.Equal(got, tc.want) || !slices.Equal(streamed, tc.want) {
			t.Errorf("%s: listed %v, streamed %v, want %v", name, got, streamed, tc.want)
		}
	}
}

func TestContainerFilters(t *testing.T) {
	c := serve(t, &fakePods{sandboxes: someSandboxes(), containers: someContainers()}, &fakeImages{}, nil)
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	for name, tc := range map[string]struct {
		filter *runtimeapi.ContainerFilter
		want   []string
	}{
		"none":           {nil, []string{"r1", "r2", "x3", "r4"}},
		"sandbox":        {&runtimeapi.ContainerFilter{PodSandboxId: "aaaa1"}, []string{"r1", "r2", "x3"}},
		"short sandbox":  {&runtimeapi.ContainerFilter{PodSandboxId: "aa"}, []string{"r1", "r2", "x3"}},
		"sandbox gone":   {&runtimeapi.ContainerFilter{PodSandboxId: "dddd"}, nil},
		"state":          {&runtimeapi.ContainerFilter{State: running, PodSandboxId: "aaaa1"}, []string{"r1", "r2"}},
		"all":            {&runtimeapi.ContainerFilter{State: running, PodSandboxId: "aaaa1", LabelSelector: map[string]string{"app": "a"}}, []string{"r2"}},
		"id and sandbox": {&runtimeapi.ContainerFilter{Id: "r4", PodSandboxId: "aaaa1"}, nil},
	} {
		resp, err := c.ListContainers(within(t), &runtimeapi.ListContainersRequest{Filter: tc.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, v := range resp.Containers {
			got = append(got, v.Id)
			if v.ImageId == "" || v.ImageRef != v.ImageId {
				t.Errorf("%s: image ids %q and %q", name, v.ImageId, v.ImageRef)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: listed %v, want %v", name, got, tc.want)
		}
	}
	stats, err := c.ListContainerStats(within(t), &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: "aaaa1"}})
	if err != nil || len(stats.Stats) != 2 {
		t.Errorf("stats of running containers: %v, %v", stats, err)
	}
	if _, err := c.ContainerStats(within(t), &runtimeapi.ContainerStatsRequest{ContainerId: "x3"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("stats of an exited container: %v", err)
	}
	pods, err := c.ListPodSandboxStats(within(t), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(pods.Stats) != 2 {
		t.Errorf("stats of ready pods: %v, %v", pods, err)
	}
}

// Lists beyond the size of a message arrive whole over the streaming calls.
func TestStreamedListsAreCutIntoMessages(t *testing.T) {
	pods := &fakePods{}
	big := map[string]string{"notes": strings.Repeat("n", 300<<10)}
	for i := range 100 {
		pods.containers = append(pods.containers, pod.Container{
			ID: fmt.Sprintf("c%03d", i), CreatedAt: time.Unix(int64(i), 0), Config: &runtimeapi.ContainerConfig{Annotations: big},
		})
	}
	c := serve(t, pods, &fakeImages{}, nil)
	if _, err := c.ListContainers(within(t), &runtimeapi.ListContainersRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a list of 30 MB in one message: %v", err)
	}
	messages := drain(t, func() (grpc.ServerStreamingClient[runtimeapi.StreamContainersResponse], error) {
		return c.StreamContainers(within(t), &runtimeapi.StreamContainersRequest{})
	})
	next := 0
	for _, m := range messages {
		if len(m.Containers) == 0 || proto.Size(m) > 2*batchBytes {
			t.Errorf("a message of %d items, %d bytes", len(m.Containers), proto.Size(m))
		}
		for _, v := range m.Containers {
			if want := fmt.Sprintf("c%03d", next); v.Id != want {
				t.Fatalf("got %s, want %s", v.Id, want)
			}
			next++
		}
	}
	if next != 100 {
		t.Errorf("%d of 100 items arrived", next)
	}
}

// The budget is 5 ms for the whole call with 1,000 containers.
func BenchmarkListContainers1000(b *testing.B) {
	pods := &fakePods{}
	for i := range 1000 {
		c := someContainers()[0]
		c.ID, c.CreatedAt = fmt.Sprintf("%064d", i), time.Unix(int64(i), 0)
		c.Config.Annotations = map[string]string{"io.kubernetes.container.hash": "5a3b", "io.kubernetes.container.restartCount": "0"}
		pods.containers = append(pods.containers, c)
	}
	c := serve(b, pods, &fakeImages{}, nil)
	for b.Loop() {
		if _, err := c.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}
