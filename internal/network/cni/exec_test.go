package cni

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/networktest"
)

const programList = `{"cniVersion":"1.1.0","name":"prog","plugins":[{"type":"prog","capabilities":{
	"portMappings":true,"bandwidth":true,"dns":true,"cgroupPath":true,"io.kubernetes.cri.pod-annotations":true}}]}`

const goodResult = `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.1.1.1/24","interface":0}],"dns":{"nameservers":["1.1.1.1"]}}`

func withProgram(t *testing.T, script string) (*Attacher, string) {
	t.Helper()
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10-prog.conflist"), programList, 0o644)
	write(t, filepath.Join(binDir(dir), "prog"), "#!/bin/sh\nDIR="+dir+"\n"+script, 0o755)
	a := start(t, dir)
	t.Cleanup(func() { shut(t, a) })
	return a, dir
}

func TestProgram(t *testing.T) {
	a, dir := withProgram(t, `cat > $DIR/stdin.$CNI_COMMAND; env > $DIR/env.$CNI_COMMAND
[ $CNI_COMMAND = ADD ] && echo '`+goodResult+`'; exit 0`)
	if err := a.Ready(); err != nil {
		t.Fatal(err)
	}
	ctx, r := deadline(t), newPod(t, "sandbox1")
	r.Ports = []network.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 8080, HostIP: netip.MustParseAddr("127.0.0.1")}}
	r.Bandwidth = &network.Bandwidth{IngressRate: 1000}
	r.DNS = &network.DNS{Servers: []string{"9.9.9.9"}}
	r.CgroupPath = "/kubepods/x"
	r.Annotations = map[string]string{"a": "b"}
	res, err := a.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.IPs) != 1 || res.IPs[0].String() != "10.1.1.1" || len(res.DNS.Servers) != 1 {
		t.Errorf("result %+v", res)
	}
	r.Cached = res.Raw
	if err := a.Detach(ctx, r); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []string{"ADD", "DEL"} {
		env, err := os.ReadFile(filepath.Join(dir, "env."+cmd))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"CNI_CONTAINERID=sandbox1", "CNI_IFNAME=eth0", "CNI_NETNS=" + r.NetNS, "CNI_PATH=" + binDir(dir),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_INFRA_CONTAINER_ID=sandbox1;K8S_POD_UID=uid",
		} {
			if !strings.Contains(string(env), want+"\n") {
				t.Errorf("%s: environment lacks %s", cmd, want)
			}
		}
		checkStdin(t, cmd, filepath.Join(dir, "stdin."+cmd))
	}
}

// checkStdin looks at the configuration that the program was given.
func checkStdin(t *testing.T, cmd, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var conf struct {
		Runtime map[string]json.RawMessage `json:"runtimeConfig"`
		Prev    json.RawMessage            `json:"prevResult"`
	}
	if err := json.Unmarshal(data, &conf); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"portMappings":                      `[{"containerPort":80,"hostIP":"127.0.0.1","hostPort":8080,"protocol":"tcp"}]`,
		"bandwidth":                         `{"egressBurst":0,"egressRate":0,"ingressBurst":4294967295,"ingressRate":1000}`,
		"dns":                               `{"options":null,"searches":null,"servers":["9.9.9.9"]}`,
		"cgroupPath":                        `"/kubepods/x"`,
		"io.kubernetes.cri.pod-annotations": `{"a":"b"}`,
	} {
		if got := canonical(t, conf.Runtime[key]); got != want {
			t.Errorf("%s: %s is %s, want %s", cmd, key, got, want)
		}
	}
	if (cmd == "DEL") != (conf.Prev != nil) {
		t.Errorf("%s: prevResult %s", cmd, conf.Prev)
	}
}

func canonical(t *testing.T, b json.RawMessage) string {
	t.Helper()
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestProgramFails(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		want   []string // in the error, beside the file's name
	}{
		"protocol":     {`echo '{"code":7,"msg":"no such pool","details":"pool x"}'; exit 1`, []string{"no such pool", "pool x"}},
		"stderr":       {`echo something broke >&2; exit 3`, []string{"something broke", "exit status 3"}},
		"silent":       {`exit 1`, []string{"without a message"}},
		"rubbish":      {`echo 'Segmentation fault'; exit 0`, []string{"Segmentation fault", "instead of a CNI result"}},
		"null":         {`echo null`, []string{"instead of a CNI result"}},
		"nothing":      {`exit 0`, []string{"instead of a CNI result"}},
		"much":         {`head -c 10000000 /dev/zero`, []string{"more than"}},
		"no address":   {`echo '{"cniVersion":"1.1.0"}'`, []string{"no address"}},
		"odd index":    {`echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.1.1/24","interface":7}]}'`, []string{"interface 7"}},
		"bad address":  {`echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.1.1"}]}'`, []string{"prog"}},
		"odd version":  {`echo '{"cniVersion":"9.0.0","ips":[]}'`, []string{"9.0.0"}},
		"null inside":  {`echo '{"cniVersion":"0.4.0","interfaces":[null]}'`, []string{"instead of a CNI result"}},
		"killed":       {`kill -9 $$`, []string{"killed"}},
		"not a script": {"\x00", []string{"prog"}},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := withProgram(t, `[ $CNI_COMMAND = ADD ] || exit 0; `+c.script)
			r := newPod(t, "fails")
			_, err := a.Attach(deadline(t), r)
			if err == nil {
				t.Fatal("attached")
			}
			for _, want := range append(c.want, "10-prog.conflist") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q: %v", want, err)
				}
			}
			if ids, err := a.Allocations(deadline(t)); err != nil || len(ids) > 0 {
				t.Errorf("allocations %v, %v", ids, err)
			}
		})
	}
}

func TestProgramHangs(t *testing.T) {
	// The child keeps the pipes open when its parent is dead.
	a, dir := withProgram(t, `[ $CNI_COMMAND = ADD ] || exit 0; sleep 600 & echo $! > $DIR/child; wait`)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_, err := a.Attach(ctx, newPod(t, "hangs"))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "prog") {
		t.Errorf("error %v, want that the deadline of prog passed", err)
	}
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("took %s", d)
	}
	pid, err := os.ReadFile(filepath.Join(dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child is gone", func() bool {
		st, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		return err != nil || strings.Contains(string(st), ") Z ")
	})
}

// TestDelRepeats is a DEL that fails at first, as when a cluster network's
// agent is restarting.
func TestDelRepeats(t *testing.T) {
	a, dir := withProgram(t, `case $CNI_COMMAND in ADD) echo '`+goodResult+`';; DEL) [ -e $DIR/works ] || { echo '{"code":11,"msg":"agent is away"}'; exit 1; };; esac`)
	ctx, r := deadline(t), newPod(t, "repeats")
	if _, err := a.Attach(ctx, r); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.Detach(ctx, r); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "agent is away") {
			t.Errorf("detach: %v, want unavailable with the plugin's words", err)
		}
	}
	if ids, err := a.Allocations(ctx); err != nil || len(ids) != 1 {
		t.Errorf("allocations %v, %v: the sandbox must be remembered", ids, err)
	}
	write(t, filepath.Join(dir, "works"), "", 0o644)
	for range 2 {
		if err := a.Detach(ctx, r); err != nil {
			t.Error(err)
		}
	}
}

func TestStatus(t *testing.T) {
	a, dir := withProgram(t, `[ $CNI_COMMAND = STATUS ] && [ -e $DIR/away ] && { echo '{"code":50,"msg":"agent is away"}'; exit 1; }
[ $CNI_COMMAND = STATUS ] && [ -e $DIR/old ] && { echo '{"code":4,"msg":"unknown CNI_COMMAND: STATUS"}'; exit 1; }
exit 0`)
	for _, c := range []struct {
		file  string
		ready bool
	}{{"", true}, {"away", false}, {"old", true}} {
		os.Remove(filepath.Join(dir, "away"))
		if c.file != "" {
			write(t, filepath.Join(dir, c.file), "", 0o644)
		}
		a.now.Load().main.status.forget()
		err := a.Ready()
		if (err == nil) != c.ready {
			t.Errorf("%q: ready: %v", c.file, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "agent is away") || !errdefs.IsUnavailable(err)) {
			t.Errorf("%q: %v", c.file, err)
		}
	}
}

// TestNeedsProgram is about keys that are not built in.
func TestNeedsProgram(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conf"), `{"cniVersion":"1.0.0","name":"v","type":"bridge","vlan":7,"ipam":{"type":"host-local","subnet":"10.9.9.0/24"}}`, 0o644)
	a := start(t, dir)
	defer shut(t, a)
	_, err := a.Attach(deadline(t), newPod(t, "vlan"))
	if err == nil || !strings.Contains(err.Error(), "vlan") || !strings.Contains(err.Error(), binDir(dir)) {
		t.Errorf("error %v, want one that names the key and the folder", err)
	}
	write(t, filepath.Join(binDir(dir), "bridge"), "#!/bin/sh\n[ $CNI_COMMAND = ADD ] && echo '"+strings.ReplaceAll(goodResult, "1.1.0", "1.0.0")+"'; exit 0\n", 0o755)
	r := newPod(t, "vlan2")
	if res, err := a.Attach(deadline(t), r); err != nil || res.IPs[0].String() != "10.1.1.1" {
		t.Errorf("with the program: %v, %v", res, err)
	}
	if err := a.Detach(deadline(t), r); err != nil {
		t.Error(err)
	}
}

func FuzzResult(f *testing.F) {
	f.Add([]byte(goodResult))
	f.Add([]byte(`{"cniVersion":"0.3.0","ips":[{"version":"4","address":"10.1.1.1/24"}]}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","ips":[{"address":"::/0","interface":-1,"gateway":""}],"interfaces":[null]}`))
	a := &Attacher{}
	a.now.Store(&setup{})
	list, err := parseConf([]byte(programList), true)
	if err != nil {
		f.Fatal(err)
	}
	networks := []confNetwork{{file: "f", ifName: "eth0", list: list}}
	f.Fuzz(func(t *testing.T, out []byte) {
		if !isResult(out) {
			return
		}
		var v struct {
			Version string `json:"cniVersion"`
		}
		if json.Unmarshal(out, &v) != nil {
			return
		}
		res, err := create.Create(v.Version, out)
		if err != nil {
			return
		}
		got, err := a.result(networks, []types.Result{res})
		if err == nil && len(got.IPs) == 0 {
			t.Errorf("%s: no address and no error", out)
		}
	})
}
