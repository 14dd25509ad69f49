package stream

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestTokens(t *testing.T) {
	noLeak(t)
	req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"echo", "x"}, Stdout: true}
	status := func(t *testing.T, url string) int {
		t.Helper()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Post(url, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	t.Run("once", func(t *testing.T) {
		s := start(t, newFake(), Options{})
		resp, err := s.GetExec(req)
		if err != nil {
			t.Fatal(err)
		}
		if out, _, err := stream(t, "spdy", resp.Url, true, false, remotecommand.StreamOptions{}); err != nil || out != "x in c1" {
			t.Fatalf("first use: %q, %v", out, err)
		}
		if code := status(t, resp.Url); code != http.StatusNotFound {
			t.Errorf("second use: status %d", code)
		}
	})
	t.Run("for its own verb only", func(t *testing.T) {
		s := start(t, newFake(), Options{})
		resp, err := s.GetExec(req)
		if err != nil {
			t.Fatal(err)
		}
		if code := status(t, strings.Replace(resp.Url, "/exec/", "/attach/", 1)); code != http.StatusNotFound {
			t.Errorf("as attach: status %d", code)
		}
	})
	t.Run("not for ever", func(t *testing.T) {
		s := start(t, newFake(), Options{TokenLife: time.Nanosecond})
		resp, err := s.GetExec(req)
		if err != nil {
			t.Fatal(err)
		}
		if code := status(t, resp.Url); code != http.StatusNotFound {
			t.Errorf("after its life: status %d", code)
		}
	})
	t.Run("guessed", func(t *testing.T) {
		s := start(t, newFake(), Options{})
		if code := status(t, s.base.JoinPath("exec", "AAAAAAAAAAAAAAAAAAAAAAAAAA").String()); code != http.StatusNotFound {
			t.Errorf("status %d", code)
		}
	})
	t.Run("bounded", func(t *testing.T) {
		s := start(t, newFake(), Options{})
		for range maxPending {
			if _, err := s.GetExec(req); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.GetExec(req); !errdefs.IsResourceExhausted(err) {
			t.Errorf("want resource exhausted, got %v", err)
		}
		for token, p := range s.tokens.pending { // as if their time were over
			p.expires = time.Now().Add(-time.Second)
			s.tokens.pending[token] = p
		}
		if _, err := s.GetExec(req); err != nil {
			t.Errorf("expired requests still count: %v", err)
		}
	})
}

func TestBadRequests(t *testing.T) {
	s := start(t, newFake(), Options{})
	for name, call := range map[string]func() error{
		"exec nil": func() error { _, err := s.GetExec(nil); return err },
		"exec no id": func() error {
			_, err := s.GetExec(&runtimeapi.ExecRequest{Cmd: []string{"x"}, Stdout: true})
			return err
		},
		"exec no command": func() error { _, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Stdout: true}); return err },
		"exec no streams": func() error {
			_, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}})
			return err
		},
		"exec tty and stderr": func() error {
			_, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdout: true, Stderr: true, Tty: true})
			return err
		},
		"attach nil":        func() error { _, err := s.GetAttach(nil); return err },
		"attach no streams": func() error { _, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c"}); return err },
		"attach tty, stderr": func() error {
			_, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c", Stderr: true, Tty: true})
			return err
		},
		"portforward nil": func() error { _, err := s.GetPortForward(nil); return err },
		"portforward port 0": func() error {
			_, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{0}})
			return err
		},
		"portforward too high": func() error {
			_, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{65536}})
			return err
		},
	} {
		if err := call(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: want invalid argument, got %v", name, err)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, tc := range []struct{ listen, prefix string }{
		{"", "http://127.0.0.1:"},
		{"0.0.0.0", "http://127.0.0.1:"},
		{"::1", "http://[::1]:"},
		{"::", "http://[::1]:"},
	} {
		t.Run("on "+tc.listen, func(t *testing.T) {
			if strings.Contains(tc.listen, ":") && !haveIPv6() {
				t.Skip("this machine has no IPv6 loopback address")
			}
			noLeak(t)
			s := start(t, newFake(), Options{Address: tc.listen})
			for transport := range transports {
				resp, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"echo", "x"}, Stdout: true})
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasPrefix(resp.Url, tc.prefix) {
					t.Errorf("URL %s, want %s…", resp.Url, tc.prefix)
				}
				if out, _, err := stream(t, transport, resp.Url, true, false, remotecommand.StreamOptions{}); err != nil || out != "x in c1" {
					t.Errorf("%s: %q, %v", transport, out, err)
				}
			}
		})
	}
}

func haveIPv6() bool {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		return false
	}
	l.Close()
	return true
}

func TestPortInUseIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Options{Port: port}, newFake())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err == nil {
		t.Error("two servers listen on one port")
	}
	if err := s.Close(within(t)); err != nil {
		t.Error(err)
	}
}

func TestTLS(t *testing.T) {
	echo := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"echo", "x"}, Stdout: true}
	t.Run("own certificate", func(t *testing.T) {
		noLeak(t)
		s := start(t, newFake(), Options{TLS: TLS{Enable: true}})
		for transport := range transports {
			if out, _, err := run(t, s, transport, echo, remotecommand.StreamOptions{}); err != nil || out != "x in c1" {
				t.Errorf("%s: %q, %v", transport, out, err)
			}
		}
		if _, err := tls.Dial("tcp", s.base.Host, &tls.Config{MaxVersion: tls.VersionTLS11, InsecureSkipVerify: true}); err == nil {
			t.Error("TLS 1.1 is accepted")
		}
	})
	t.Run("files", func(t *testing.T) {
		noLeak(t)
		cert, key := writePair(t)
		s := start(t, newFake(), Options{TLS: TLS{Enable: true, CertFile: cert, KeyFile: key}})
		if out, _, err := run(t, s, "spdy", echo, remotecommand.StreamOptions{}); err != nil || out != "x in c1" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("client that leaves", func(t *testing.T) {
		noLeak(t)
		f := newFake()
		s := start(t, f, Options{TLS: TLS{Enable: true}})
		resp, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"wait"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		client, err := transports["spdy"](resp.Url)
		if err != nil {
			t.Fatal(err)
		}
		ctx, leave := context.WithCancel(within(t))
		left := make(chan error, 1)
		go func() { left <- client.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard}) }()
		receive(t, f.started)
		leave()
		receive(t, f.ended)
		<-left
	})
	cert, _ := writePair(t)
	for name, c := range map[string]TLS{
		"no key":        {Enable: true, CertFile: cert},
		"no such files": {Enable: true, CertFile: filepath.Join(t.TempDir(), "c"), KeyFile: filepath.Join(t.TempDir(), "k")},
	} {
		if _, err := New(Options{TLS: c}, newFake()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
