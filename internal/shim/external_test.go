package shim

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

func answer(t testing.TB, r *bootapi.BootstrapResult) string {
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestParseBootstrap(t *testing.T) {
	good := &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: "unix:///run/x"}
	asJSON, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, out := range map[string]string{"protobuf": answer(t, good), "json": string(asJSON)} {
		if r, err := parseBootstrap([]byte(out)); err != nil || r.Address != good.Address || r.Version != 3 {
			t.Errorf("%s gave %v, %v", name, r, err)
		}
	}
	for name, out := range map[string]string{
		"nothing":       "",
		"bare address":  "unix:///run/x\n", // of task API 2
		"grpc":          answer(t, &bootapi.BootstrapResult{Version: 3, Protocol: "grpc", Address: "unix:///run/x"}),
		"vsock":         answer(t, &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: "vsock://3:1"}),
		"older version": answer(t, &bootapi.BootstrapResult{Version: 2, Protocol: "ttrpc", Address: "unix:///run/x"}),
		"rubbish":       strings.Repeat("rubbish ", 1000),
	} {
		if _, err := parseBootstrap([]byte(out)); !errdefs.IsNotImplemented(err) || len(err.Error()) > 1000 {
			t.Errorf("%s gave %v", name, err)
		}
	}
}

func FuzzParseBootstrap(f *testing.F) {
	f.Add([]byte(answer(f, &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: "unix:///run/x"})))
	f.Add([]byte(`{"version":3,"protocol":"ttrpc","address":"unix:///run/x"}`))
	f.Add([]byte("unix:///run/x"))
	f.Fuzz(func(t *testing.T, out []byte) {
		r, err := parseBootstrap(out)
		if err == nil && (r.Protocol != "ttrpc" || r.Version < 3 || !strings.HasPrefix(r.Address, "unix://")) {
			t.Errorf("%q was taken as %v", out, r)
		}
	})
}

// A shim that has died leaves its socket; one that was cleaned up after none.
func TestDialExternal(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "cl") // short, for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	address := filepath.Join(dir, "s")
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	lis.SetUnlinkOnClose(false)
	c, err := dialExternal(t.Context(), "unix://"+address)
	if err != nil {
		t.Fatal(err)
	}
	c.client.Close()
	lis.Close()
	for _, what := range []string{"left behind", "absent"} {
		if _, err := dialExternal(t.Context(), "unix://"+address); !errors.Is(err, errGone) || !errdefs.IsNotFound(err) {
			t.Errorf("a socket that is %s gave %v", what, err)
		}
		if err := os.RemoveAll(address); err != nil {
			t.Fatal(err)
		}
	}
	d := dialer{connect: func(ctx context.Context) (*conn, error) { return dialExternal(ctx, address) }}
	if err := d.call(t.Context(), true, func(context.Context, *conn) error { return nil }); !errors.Is(err, errGone) {
		t.Errorf("a call to a shim that has ended gave %v", err)
	}
}

func TestSocketDir(t *testing.T) {
	for state, short := range map[string]bool{"/run/cloister/shim": true, "/" + strings.Repeat("x", 60): false} {
		c := &Client{o: Options{State: state}}
		if got := c.socketDir(); len(got) > longestSocketDir || strings.HasPrefix(got, state) != short {
			t.Errorf("sockets of %s are in %s", state, got)
		}
	}
}
