package oci

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestArguments(t *testing.T) {
	for name, c := range map[string]struct {
		entrypoint, cmd, command, args, want []string
	}{
		"image's":                   {entrypoint: []string{"e"}, cmd: []string{"c"}, want: []string{"e", "c"}},
		"args replace CMD":          {entrypoint: []string{"e"}, cmd: []string{"c"}, args: []string{"a"}, want: []string{"e", "a"}},
		"command drops CMD":         {entrypoint: []string{"e"}, cmd: []string{"c"}, command: []string{"x"}, want: []string{"x"}},
		"both":                      {entrypoint: []string{"e"}, cmd: []string{"c"}, command: []string{"x"}, args: []string{"a"}, want: []string{"x", "a"}},
		"cleared ENTRYPOINT":        {entrypoint: []string{""}, cmd: []string{"c"}, want: []string{"c"}},
		"only CMD":                  {cmd: []string{"c"}, want: []string{"c"}},
		"newline and empty in args": {command: []string{"x", "", "a\nb"}, want: []string{"x", "", "a\nb"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := arguments(&runtimeapi.ContainerConfig{Command: c.command, Args: c.args}, c.entrypoint, c.cmd)
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
	_, err := arguments(&runtimeapi.ContainerConfig{}, nil, nil)
	wantError(t, err, errdefs.ErrInvalidArgument, "no command")
	_, err = arguments(&runtimeapi.ContainerConfig{Command: []string{"a\x00b"}}, nil, nil)
	wantError(t, err, errdefs.ErrInvalidArgument, "NUL")
}

func TestEnvironment(t *testing.T) {
	in := typical(t)
	in.Image.Env = append(in.Image.Env, "NOVALUE", "=x", "EMPTY=", "PEM=image")
	in.Config.Tty = true
	res := build(t, in)
	want := []string{
		"PATH=/app:/bin", "TERM=xterm", "HOSTNAME=web-0", "A=config", "B=image", "EMPTY=", "PEM=line\nline", "HOME=/home/default",
	}
	if !slices.Equal(res.Spec.Process.Env, want) {
		t.Errorf("variables are %q, want %q", res.Spec.Process.Env, want)
	}
	if len(res.Warnings) != 2 {
		t.Errorf("warnings are %q, want two about variables", res.Warnings)
	}
	in.Sandbox.Hostname = ""
	in.Image.Env = []string{"HOME=/mine", "TERM=dumb"}
	env := build(t, in).Spec.Process.Env
	for _, v := range []string{"HOSTNAME=node-1", "HOME=/mine", "TERM=dumb"} {
		if !slices.Contains(env, v) {
			t.Errorf("variables %q lack %q", env, v)
		}
	}
}

func TestWorkingDir(t *testing.T) {
	for _, c := range []struct{ config, image, want string }{
		{"", "", "/"}, {"", "/srv", "/srv"}, {"/cfg", "/srv", "/cfg"}, {"rel", "", "/rel"}, {"", "a/../../../b", "/b"}, {"/proc", "", "/proc"},
	} {
		got, err := workingDir(c.config, c.image)
		if err != nil || got != c.want {
			t.Errorf("workingDir(%q, %q) is %q, %v, want %q", c.config, c.image, got, err, c.want)
		}
	}
	for _, dir := range []string{"/proc/self/fd/8", "/proc/1/root", "//proc/self/cwd", "/dev/fd/7", "/x\x00", strings.Repeat("/a", 4096)} {
		_, err := workingDir("", dir)
		wantError(t, err, errdefs.ErrInvalidArgument, "WORKDIR of the image")
	}
}

func TestExec(t *testing.T) {
	res := build(t, typical(t))
	before, _ := json.Marshal(res.Spec)
	p, err := Exec(res.Spec, "", []string{"sh", "-c", "id"}, true)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Terminal || !slices.Contains(p.Env, "TERM=xterm") || !p.NoNewPrivileges || p.User.UID != 1000 || p.Cwd != "/srv" {
		t.Errorf("process is %+v", p)
	}
	p.Env[0], p.Capabilities.Bounding[0], p.User.AdditionalGids[0], *p.OOMScoreAdj = "x", "x", 7, 7
	after, _ := json.Marshal(res.Spec)
	if !bytes.Equal(before, after) {
		t.Error("the process shares memory with the container's spec")
	}
	if p, _ = Exec(res.Spec, "", []string{"id"}, false); p.Terminal || slices.Contains(p.Env, "TERM=xterm") {
		t.Errorf("process without terminal is %+v", p)
	}
	_, err = Exec(res.Spec, "", nil, false)
	wantError(t, err, errdefs.ErrInvalidArgument, "cmd")
	_, err = Exec(&specs.Spec{}, "", []string{"id"}, false)
	wantError(t, err, errdefs.ErrFailedPrecondition, "no process")
}

func TestStopSignal(t *testing.T) {
	for _, c := range []struct {
		config runtimeapi.Signal
		image  string
		want   string
	}{
		{0, "", "SIGTERM"}, {0, "SIGQUIT", "SIGQUIT"}, {0, "9", "SIGKILL"}, {0, "int", "SIGINT"},
		{0, "SIGRTMIN+3", "SIGRTMIN+3"}, {0, "37", "SIGRTMIN+3"}, {0, "RTMAX-2", "SIGRTMAX-2"},
		{runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS14, "SIGQUIT", "SIGRTMAX-14"},
		{runtimeapi.Signal_SIGNAL_SIGUSR1, "nonsense", "SIGUSR1"},
	} {
		in := typical(t)
		in.Config.StopSignal, in.Image.StopSignal = c.config, c.image
		if got := build(t, in).StopSignal; got != c.want {
			t.Errorf("stop signal of %v, %q is %q, want %q", c.config, c.image, got, c.want)
		}
	}
	for value, name := range runtimeapi.Signal_name {
		s := runtimeapi.Signal(value)
		if err := checkSignal(s); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s == 0 {
			continue
		}
		n, err := ParseSignal(criSignal(s))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		again, _ := ParseSignal(SignalName(n))
		if back := CRISignal(SignalName(n)); again != n || back == 0 {
			t.Errorf("%s is %d, which is called %s and comes back as %v", name, n, SignalName(n), back)
		}
	}
	for _, bad := range []string{"SIGNONE", "0", "65", "-1", "+9", "SIGRTMIN+31", "SIGRTMIN+-1", "", "SIG"} {
		if s, err := ParseSignal(bad); err == nil {
			t.Errorf("ParseSignal(%q) is %v, want an error", bad, s)
		}
	}
	in := typical(t)
	in.Image.StopSignal = "SIGFOO"
	refuse(t, in, errdefs.ErrInvalidArgument, "STOPSIGNAL")
}
