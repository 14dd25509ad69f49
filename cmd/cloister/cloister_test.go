package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

func TestJudge(t *testing.T) {
	tests := []struct {
		name string
		err  error
		code int
		text string
	}{
		{"fine", nil, 0, ""},
		{"plain", errors.New("broken"), 1, "broken"},
		{"usage", usage(errors.New("bad flag")), 2, "bad flag"},
		{"interrupted", fmt.Errorf("wait: %w", context.Canceled), 130, "interrupted"},
		{"the container's own", runError(&client.ExitError{Code: 42}), 42, ""},
		{"run without daemon", runError(client.ErrNoDaemon), 125, "no daemon"},
		{"run, not found", runError(fmt.Errorf("start: %w", client.ErrCommandNotFound)), 127, "not found"},
		{"run, not runnable", runError(fmt.Errorf("start: %w", client.ErrCommandNotRunnable)), 126, "cannot be run"},
		{"status", fmt.Errorf("stop x: %w", status.Error(codes.NotFound, "no x")), 1, "stop x: no x"},
	}
	for _, tt := range tests {
		code, text := judge(tt.err)
		if code != tt.code || !strings.Contains(text, tt.text) || strings.Contains(text, "rpc error") {
			t.Errorf("%s: got %d, %q; want %d, %q", tt.name, code, text, tt.code, tt.text)
		}
	}
}

func TestCommandLine(t *testing.T) {
	t.Setenv(addressEnv, "/tmp/no-daemon-here.sock")
	tests := []struct {
		line string
		code int
	}{
		{"ps", 1}, {"ps extra", 2}, {"ps --no-such-flag", 2}, {"ps -o xml", 2}, {"bogus", 2},
		{"logs", 2}, {"logs --since never x", 1}, {"exec x", 2}, {"stop", 2}, {"rm", 2}, {"rmi", 2}, {"pull", 2}, {"inspect a b", 2},
		{"run", 2}, {"run -p x:y img", 2}, {"run -v x img", 2}, {"run -e = img", 2}, {"run -d --rm img", 2}, {"run img", 125},
		{"daemon extra", 2}, {"daemon --config /no/such/file", 2}, {"daemon --root relative", 2}, {"daemon --log-level loud", 2},
		{"debug fsck", 1}, {"version", 1},
		{"completion bash", 0}, {"run --help", 0},
	}
	for _, tt := range tests {
		t.Run(tt.line, func(t *testing.T) {
			a := &app{}
			root := a.root()
			var out strings.Builder
			root.SetOut(&out)
			root.SetErr(&out)
			root.SetArgs(strings.Fields(tt.line))
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if code, text := judge(root.ExecuteContext(ctx)); code != tt.code {
				t.Errorf("exit code %d (%s), want %d", code, text, tt.code)
			}
		})
	}
}

func TestEveryCommandIsExplained(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" || c.Runnable() && c.Example == "" && c.HasParent() && !c.HasSubCommands() {
			t.Errorf("%s: no short description or no example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&app{}).root())
}

func TestSinceTime(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	tests := []struct {
		in   string
		want time.Time
		bad  bool
	}{
		{"", time.Time{}, false}, {"10m", now.Add(-10 * time.Minute), false},
		{"2026-01-02T03:00:00Z", now.Add(-4*time.Minute - 5*time.Second), false}, {"yesterday", time.Time{}, true},
	}
	for _, tt := range tests {
		got, err := sinceTime(tt.in, now)
		if !got.Equal(tt.want) || (err != nil) != tt.bad {
			t.Errorf("%q: got %v, %v", tt.in, got, err)
		}
	}
}

func TestSplitTag(t *testing.T) {
	tests := []struct{ ref, name, tag string }{
		{"docker.io/library/busybox:1.36", "docker.io/library/busybox", "1.36"},
		{"localhost:5000/x", "localhost:5000/x", ""},
		{"localhost:5000/x:1", "localhost:5000/x", "1"},
		{"a/b@sha256:00", "a/b", ""},
	}
	for _, tt := range tests {
		if name, tag := splitTag(tt.ref); name != tt.name || tag != tt.tag {
			t.Errorf("%s: got %q, %q", tt.ref, name, tag)
		}
	}
}

func TestContainerTable(t *testing.T) {
	now := time.Unix(1000, 0)
	pods := []*runtimeapi.PodSandbox{{Id: "pod1", Metadata: &runtimeapi.PodSandboxMetadata{Name: "web-0", Namespace: "shop"}, RuntimeHandler: "crun"}}
	list := []*runtimeapi.Container{{
		Id: "0123456789abcdef", PodSandboxId: "pod1", Metadata: &runtimeapi.ContainerMetadata{Name: "web", Attempt: 2},
		Image: &runtimeapi.ImageSpec{Image: "sha256:0011223344556677"}, State: runtimeapi.ContainerState_CONTAINER_RUNNING,
		CreatedAt: now.Add(-5 * time.Second).UnixNano(),
	}}
	rows := containerTable(list, pods, true, now).Rows
	want := "0123456789abc web 0011223344556 running 5s ago web-0 shop 2 pod1 crun"
	if got := strings.Join(rows[0], " "); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// A pod that was removed between the two lists leaves blanks.
	if rows = containerTable(list, nil, false, now).Rows; rows[0][5] != "" {
		t.Errorf("got %q", rows[0])
	}
}

// vanishing is a daemon of which one pod is gone by the time its status is
// asked for.
type vanishing struct {
	runtimeapi.RuntimeServiceClient
	fail codes.Code
}

func (v vanishing) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest, _ ...grpc.CallOption) (*runtimeapi.PodSandboxStatusResponse, error) {
	if r.PodSandboxId == "gone" {
		return nil, status.Error(v.fail, "no pod sandbox gone")
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.1.2.3", AdditionalIps: []*runtimeapi.PodIP{{Ip: "fd00::3"}}}}}, nil
}

func TestPodsThatVanish(t *testing.T) {
	list := []*runtimeapi.PodSandbox{{Id: "gone"}, {Id: "here", Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"}}}
	table, err := podTable(t.Context(), &client.Conn{Runtime: vanishing{fail: codes.NotFound}}, list, true, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := table.Write(&out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "web") || !strings.Contains(s, "10.1.2.3, fd00::3") || strings.Contains(s, "gone") {
		t.Errorf("the table is %q", s)
	}
	if _, err := podTable(t.Context(), &client.Conn{Runtime: vanishing{fail: codes.Unavailable}}, list, true, time.Now()); err == nil {
		t.Error("a daemon that does not answer passes for a pod that is gone")
	}
}
