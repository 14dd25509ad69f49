package oci

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/errdefs"
)

const (
	// maxArgument is the kernel's MAX_ARG_STRLEN without the closing NUL.
	maxArgument = 128<<10 - 1
	// maxArguments is the most that execve(2) takes for all arguments and
	// variables together, whatever the stack limit is.
	maxArguments = 6 << 20

	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	defaultTerm = "TERM=xterm"
)

// setProcess writes what runs: arguments, variables, directory, terminal.
func (b *builder) setProcess() error {
	p := b.spec.Process
	args, err := arguments(b.in.Config, b.in.Image.Entrypoint, b.in.Image.Cmd)
	if err != nil {
		return err
	}
	p.Args = args
	p.Terminal = b.in.Config.GetTty()
	if err := b.setEnv(); err != nil {
		return err
	}
	if err := checkExecSize(p.Args, p.Env); err != nil {
		return err
	}
	p.Cwd, err = workingDir(b.in.Config.GetWorkingDir(), b.in.Image.WorkingDir)
	if err != nil {
		return err
	}
	p.NoNewPrivileges = b.sc.GetNoNewPrivs()
	b.setRlimits()
	return nil
}

// setRlimits lays the handler's limits over those of a base spec.
func (b *builder) setRlimits() {
	p := b.spec.Process
	for _, l := range b.in.Handler.Rlimits {
		p.Rlimits = slices.DeleteFunc(p.Rlimits, func(o specs.POSIXRlimit) bool { return o.Type == l.Type })
		p.Rlimits = append(p.Rlimits, l)
	}
}

// arguments follows Kubernetes: command replaces ENTRYPOINT and drops CMD,
// args replaces CMD.
func arguments(cfg *runtimeapi.ContainerConfig, entrypoint, cmd []string) ([]string, error) {
	command, args := cfg.GetCommand(), cfg.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = cmd
		}
		// Builders write [""] for a cleared ENTRYPOINT.
		if len(entrypoint) != 1 || entrypoint[0] != "" {
			command = entrypoint
		}
	}
	all := slices.Concat(command, args)
	if len(all) == 0 {
		return nil, fmt.Errorf("no command: the image has neither ENTRYPOINT nor CMD; set command or args: %w", errdefs.ErrInvalidArgument)
	}
	return all, checkArguments("command and args", all)
}

// checkArguments refuses what JSON or execve(2) cannot carry. An argument may
// be a secret, so an error tells its place and not the argument.
func checkArguments(field string, args []string) error {
	for i, a := range args {
		if strings.ContainsRune(a, 0) || !utf8.ValidString(a) {
			return invalid("entry of "+field, i, "NUL bytes and invalid UTF-8 are not allowed")
		}
	}
	return nil
}

// setEnv layers the variables: defaults, the image's, the container's; a later
// value takes the earlier one's place.
func (b *builder) setEnv() error {
	hostname := b.in.Sandbox.GetHostname()
	if hostname == "" {
		name, err := b.k.hostname()
		if err != nil {
			return fmt.Errorf("ask for the node's host name: %w", err)
		}
		hostname = name
	}
	env := newEnviron(b.spec.Process.Env)
	env.set(defaultPath)
	if b.in.Config.GetTty() {
		env.set(defaultTerm)
	}
	env.set("HOSTNAME=" + hostname)
	for _, e := range b.in.Image.Env {
		key, _, ok := strings.Cut(e, "=")
		if !ok || key == "" {
			b.warn("variable %s of the image is ignored: it is not KEY=value", show(e))
			continue
		}
		if strings.ContainsRune(e, 0) || !utf8.ValidString(e) {
			return invalid("variable of the image", key, "NUL bytes and invalid UTF-8 are not allowed; use another image")
		}
		env.set(e)
	}
	for _, e := range b.in.Config.GetEnvs() {
		env.set(e.GetKey() + "=" + string(e.GetValue()))
	}
	b.spec.Process.Env = env.list
	return nil
}

// environ is an ordered set of variables.
type environ struct {
	list  []string
	index map[string]int
}

func newEnviron(list []string) *environ {
	e := &environ{index: make(map[string]int, len(list)+16)}
	for _, v := range list {
		e.set(v)
	}
	return e
}

func (e *environ) set(variable string) {
	key, _, _ := strings.Cut(variable, "=")
	if i, ok := e.index[key]; ok {
		e.list[i] = variable
		return
	}
	e.index[key] = len(e.list)
	e.list = append(e.list, variable)
}

func lookUpEnv(env []string, key string) (string, bool) {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, key+"="); ok {
			return value, true
		}
	}
	return "", false
}

// checkExecSize refuses what execve(2) would refuse with "argument list too
// long", which tells nobody what was too long.
func checkExecSize(args, env []string) error {
	const remedy = "the kernel takes at most 131071 bytes for one; shorten it or pass a file"
	const extra = 1 + 8 // the NUL and the pointer
	total := 0
	for i, a := range args {
		if len(a) > maxArgument {
			return invalid("length of argument "+strconv.Itoa(i), len(a), remedy)
		}
		total += len(a) + extra
	}
	for _, v := range env {
		if len(v) > maxArgument {
			key, _, _ := strings.Cut(v, "=")
			return invalid("length of variable "+show(key), len(v), remedy)
		}
		total += len(v) + extra
	}
	if total > maxArguments {
		return invalid("bytes of arguments and variables", total, "the kernel takes at most 6 MiB; pass files instead")
	}
	return nil
}

// workingDir prefers the container's directory over the image's. Directories
// that are reached through a process's open files are refused: they are how
// CVE-2024-21626 left the container.
func workingDir(config, image string) (string, error) {
	field, dir := "working_dir", config
	if dir == "" {
		field, dir = "WORKDIR of the image", image
	}
	if dir == "" {
		return "/", nil
	}
	if len(dir) > maxPath || strings.ContainsRune(dir, 0) || !utf8.ValidString(dir) {
		return "", invalid(field, dir, "give an absolute path of at most 4095 bytes")
	}
	clean := inContainer(dir)
	if (beneath(clean, "/proc") && clean != "/proc") || beneath(clean, "/dev/fd") {
		return "", invalid(field, dir, "a directory in /proc or /dev/fd is not allowed; choose another")
	}
	return clean, nil
}

// Exec makes the process of an exec: everything of the container's first
// process but what it runs and its terminal. rootfs is not read: the user and
// HOME were resolved when the container was made.
func Exec(container *specs.Spec, rootfs string, cmd []string, tty bool) (*specs.Process, error) {
	if container == nil || container.Process == nil {
		return nil, fmt.Errorf("exec: the container's spec has no process: %w", errdefs.ErrFailedPrecondition)
	}
	if len(cmd) == 0 || cmd[0] == "" {
		return nil, fmt.Errorf("exec: no command: set cmd: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkArguments("cmd", cmd); err != nil {
		return nil, err
	}
	p := *container.Process
	p.Args = slices.Clone(cmd)
	p.CommandLine = ""
	p.Terminal = tty
	p.ConsoleSize = nil
	p.Env = slices.Clone(p.Env)
	if _, ok := lookUpEnv(p.Env, "TERM"); tty && !ok {
		p.Env = append(p.Env, defaultTerm)
	}
	p.User.AdditionalGids = slices.Clone(p.User.AdditionalGids)
	p.Rlimits = slices.Clone(p.Rlimits)
	p.Capabilities = cloneCapabilities(p.Capabilities)
	if p.OOMScoreAdj != nil {
		score := *p.OOMScoreAdj
		p.OOMScoreAdj = &score
	}
	if err := checkExecSize(p.Args, p.Env); err != nil {
		return nil, err
	}
	return &p, nil
}

func cloneCapabilities(c *specs.LinuxCapabilities) *specs.LinuxCapabilities {
	if c == nil {
		return nil
	}
	return &specs.LinuxCapabilities{
		Bounding:    slices.Clone(c.Bounding),
		Effective:   slices.Clone(c.Effective),
		Inheritable: slices.Clone(c.Inheritable),
		Permitted:   slices.Clone(c.Permitted),
		Ambient:     slices.Clone(c.Ambient),
	}
}
