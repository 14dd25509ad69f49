package display

import (
	"bytes"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	debugv1 "cloister.dev/api/debug/v1"
)

func TestBytes(t *testing.T) {
	tests := map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 15_000: "14.6 KiB", 1 << 20: "1.00 MiB",
		1023 << 10: "1.00 MiB", 150 << 20: "150 MiB", 1 << 63: "8.00 EiB",
	}
	for n, want := range tests {
		if got := Bytes(n); got != want {
			t.Errorf("%d: got %q, want %q", n, got, want)
		}
	}
}

func TestAge(t *testing.T) {
	now := time.Unix(1_000_000_000, 0)
	tests := []struct {
		ago  time.Duration
		want string
	}{
		{0, "0s ago"}, {-time.Hour, "0s ago"}, {119 * time.Second, "119s ago"}, {2 * time.Minute, "2m ago"},
		{3 * time.Hour, "3h ago"}, {50 * time.Hour, "2d ago"},
	}
	for _, tt := range tests {
		if got := Age(now.Add(-tt.ago).UnixNano(), now); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.ago, got, tt.want)
		}
	}
	if got := Age(0, now); got != "" {
		t.Errorf("no time: %q", got)
	}
}

func TestTable(t *testing.T) {
	table := Table{Heading: []string{"A", "LONG", "C"}}
	table.Add("1", "2", "3")
	table.Add("wide cell", "", "evil\x1b[31m\nname")
	var out bytes.Buffer
	if err := table.Write(&out); err != nil {
		t.Fatal(err)
	}
	want := "A           LONG   C\n1           2      3\nwide cell   -      evil?[31m?name\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestMessage(t *testing.T) {
	m := &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{Id: "x<y", State: runtimeapi.ContainerState_CONTAINER_EXITED}}}
	for f, want := range map[Format]string{JSON: `"id": "x<y"`, YAML: "id: x<y"} {
		var out bytes.Buffer
		if err := Message(&out, f, m); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), want) || !strings.Contains(out.String(), "CONTAINER_EXITED") {
			t.Errorf("%s: %s", f, out.String())
		}
	}
}

func TestFormatRefusesOthers(t *testing.T) {
	f := Plaintext
	if err := f.Set("xml"); err == nil || f != Plaintext {
		t.Errorf("got %v, %s", err, f)
	}
	if err := f.Set("yaml"); err != nil || !f.Structured() {
		t.Errorf("got %v, %s", err, f)
	}
}

func TestBarLine(t *testing.T) {
	b := &Bar{image: "img"}
	tests := []struct {
		name   string
		layers []*debugv1.Layer
		want   []string
	}{
		{"half", []*debugv1.Layer{{State: debugv1.Layer_DOWNLOADING, Offset: 512, Total: 1024}, {}},
			[]string{strings.Repeat("█", 12) + "░", "512 B of 1.00 KiB", "0/2 layers", "512 B/s"}},
		{"sizes unknown", []*debugv1.Layer{{State: debugv1.Layer_DOWNLOADING, Offset: 10}}, []string{"10 B of 10 B"}},
		{"unpacking", []*debugv1.Layer{{State: debugv1.Layer_DONE, Offset: 4, Total: 4}, {State: debugv1.Layer_UNPACKING, Offset: 4, Total: 4}},
			[]string{strings.Repeat("█", 24), "1/2 layers", "unpacking"}},
		{"all here before", []*debugv1.Layer{{State: debugv1.Layer_DONE}}, []string{strings.Repeat("█", 24), "1/1 layers"}},
	}
	for _, tt := range tests {
		line := b.line(tt.layers, time.Second)
		for _, w := range tt.want {
			if !strings.Contains(line, w) {
				t.Errorf("%s: %q lacks %q", tt.name, line, w)
			}
		}
	}
}

func TestBarIsQuietOffTerminals(t *testing.T) {
	var out bytes.Buffer
	b := NewBar(&out, "img\x1b", false)
	b.Update([]*debugv1.Layer{{Offset: 1, Total: 2}})
	b.Done(nil)
	if got := out.String(); strings.ContainsAny(got, "\r\x1b█") || !strings.HasPrefix(got, "pulling img?\npulled img?") {
		t.Errorf("got %q", got)
	}
}
