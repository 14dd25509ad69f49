package client

import (
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestParsePort(t *testing.T) {
	tests := []struct {
		in   string
		want *runtimeapi.PortMapping
	}{
		{"80", &runtimeapi.PortMapping{ContainerPort: 80, HostPort: 80}},
		{"8080:80", &runtimeapi.PortMapping{ContainerPort: 80, HostPort: 8080}},
		{"53:53/udp", &runtimeapi.PortMapping{ContainerPort: 53, HostPort: 53, Protocol: runtimeapi.Protocol_UDP}},
		{"127.0.0.1:8080:80/TCP", &runtimeapi.PortMapping{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}},
		{"[::1]:8080:80", &runtimeapi.PortMapping{ContainerPort: 80, HostPort: 8080, HostIp: "::1"}},
		{"", nil}, {":", nil}, {":80", nil}, {"80:", nil}, {"0:80", nil}, {"80:65536", nil}, {"-1", nil},
		{"a:80", nil}, {"80/icmp", nil}, {"host:80:80", nil}, {"1.2.3.4::80", nil},
	}
	for _, tt := range tests {
		got, err := ParsePort(tt.in)
		if (err != nil) != (tt.want == nil) || err == nil && !proto.Equal(got, tt.want) {
			t.Errorf("%q: got %v, %v; want %v", tt.in, got, err, tt.want)
		}
	}
}

func TestParseMount(t *testing.T) {
	tests := []struct {
		in   string
		want *runtimeapi.Mount
	}{
		{"/a:/b", &runtimeapi.Mount{HostPath: "/a", ContainerPath: "/b"}},
		{"/a:/b:ro", &runtimeapi.Mount{HostPath: "/a", ContainerPath: "/b", Readonly: true}},
		{"./x:/b/:rw", &runtimeapi.Mount{HostPath: "/cwd/x", ContainerPath: "/b"}},
		{"/a", nil}, {"/a:b", nil}, {":/b", nil}, {"/a:/b:z", nil}, {"/a:/b:ro:rw", nil},
	}
	for _, tt := range tests {
		got, err := ParseMount(tt.in, "/cwd")
		if (err != nil) != (tt.want == nil) || err == nil && !proto.Equal(got, tt.want) {
			t.Errorf("%q: got %v, %v; want %v", tt.in, got, err, tt.want)
		}
	}
}

func TestParseEnv(t *testing.T) {
	lookup := func(name string) (string, bool) { return "here", name == "SET" }
	tests := []struct{ in, name, value string }{
		{"A=1", "A", "1"}, {"A=", "A", ""}, {"A=b=c", "A", "b=c"}, {"SET", "SET", "here"},
		{"UNSET", "", ""}, {"=x", "", ""}, {"", "", ""},
	}
	for _, tt := range tests {
		got, err := ParseEnv(tt.in, lookup)
		if (err != nil) != (tt.name == "") || got.GetKey() != tt.name || string(got.GetValue()) != tt.value {
			t.Errorf("%q: got %v, %v", tt.in, got, err)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	f.Add("127.0.0.1:8080:80/tcp")
	f.Add("[fe80::1%eth0]:1:2/sctp")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParsePort(s)
		if err == nil && (m.HostPort < 1 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535) {
			t.Errorf("%q: %v", s, m)
		}
	})
}
