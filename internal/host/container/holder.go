package container

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/elf"
	"cloister.dev/internal/host/proc"
)

// StartSandbox is part of backend.Backend. Containers need nothing that holds
// their sandbox together but a PID namespace, which lives only as long as its
// first process.
func (b *Backend) StartSandbox(ctx context.Context, s *backend.SandboxSpec, exited func(proc.Exit)) (st backend.Started, err error) {
	if !s.SharePID {
		return st, nil
	}
	if s.UserNamespace == "" {
		st, err = b.holderProcess(s, exited)
	} else {
		st, err = b.nestedHolder(ctx, s, exited)
	}
	if err != nil {
		return st, fmt.Errorf("start the holder of the PID namespace: %w", err)
	}
	if s.CgroupPath != "" {
		if err := enterCgroup(s, st.Pid); err != nil {
			return st, errors.Join(err, b.StopSandbox(ctx, s, st.Process))
		}
	}
	return st, nil
}

// holderArgs is how a holder of a sandbox shows in lists of processes.
func holderArgs(id string) []string { return []string{"cloister-pause", id} }

// holderProcess starts a holder as our child in a new PID namespace.
func (b *Backend) holderProcess(s *backend.SandboxSpec, exited func(proc.Exit)) (st backend.Started, err error) {
	path, err := b.holderProgram("holder", elf.Holder)
	if err != nil {
		return st, err
	}
	st.Pid, err = b.reaper.Start(proc.Command{Path: path, Args: holderArgs(s.ID), Dir: "/",
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setsid: true}}, exited)
	if err != nil {
		return st, err
	}
	stat, err := proc.ReadStat(st.Pid)
	if err != nil {
		return st, err
	}
	st.Process.Start = stat.Start
	st.Pidfd, err = proc.OpenPidfd(st.Pid)
	return st, err
}

// nestedHolder has a program make the PID namespace inside a user namespace,
// which a process with several threads, like this one, cannot join.
func (b *Backend) nestedHolder(ctx context.Context, s *backend.SandboxSpec, exited func(proc.Exit)) (st backend.Started, err error) {
	path, err := b.holderProgram("holder-userns", elf.NestedHolder)
	if err != nil {
		return st, err
	}
	ns, err := os.Open(s.UserNamespace)
	if err != nil {
		return st, fmt.Errorf("open the user namespace: %w", err)
	}
	defer ns.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return st, err
	}
	defer r.Close()
	done := b.reaper.Birth()
	defer done()
	exit, err := b.reaper.RunCommand(ctx, proc.Command{Path: path, Args: holderArgs(s.ID), Dir: "/",
		Extra: []*os.File{ns, w}, Sys: &syscall.SysProcAttr{Setsid: true}})
	w.Close()
	if err != nil {
		return st, err
	}
	if exit.Status != 0 {
		return st, fmt.Errorf("make a PID namespace in %s: %w", s.UserNamespace, syscall.Errno(exit.Status))
	}
	var pid [4]byte
	if _, err := io.ReadFull(r, pid[:]); err != nil {
		return st, fmt.Errorf("read the holder's pid: %w", err)
	}
	st.Pid = int(binary.LittleEndian.Uint32(pid[:]))
	st.Pidfd, st.Process.Start, err = b.reaper.Adopt(st.Pid, exited)
	return st, err
}

// holderProgram writes the program once.
func (b *Backend) holderProgram(name string, assemble func() ([]byte, error)) (string, error) {
	path := filepath.Join(b.dir, name)
	b.holder.Lock()
	defer b.holder.Unlock()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	prog, err := assemble()
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(path+".new", prog, 0o755); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// madeCgroup is a file in the sandbox's folder that tells that its cgroup was
// made by us and so is ours to remove.
const madeCgroup = "backend-made-cgroup"

// enterCgroup puts a process into the same path of every hierarchy.
func enterCgroup(s *backend.SandboxSpec, pid int) error {
	if !filepath.IsAbs(s.CgroupPath) {
		return fmt.Errorf("cgroup path %q is not absolute", s.CgroupPath)
	}
	for _, mount := range cgroupMounts() {
		dir := filepath.Join(mount, s.CgroupPath)
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			if err := os.WriteFile(filepath.Join(s.Dir, madeCgroup), nil, 0o600); err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("make the sandbox's cgroup: %w", err)
			}
		}
		err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		// A cpuset without CPUs takes nobody (ENOSPC); that of the parent
		// then holds.
		if err != nil && !errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("put the holder into its cgroup: %w", err)
		}
	}
	return nil
}

// cgroupMounts lists where the cgroup hierarchies are mounted.
func cgroupMounts() []string {
	all, err := mountedHierarchies()
	if err != nil {
		return nil
	}
	seen := map[string]bool{}
	var mounts []string
	for name, h := range all {
		// The unified hierarchy of a hybrid machine is systemd's.
		if name == "" && len(all) > 1 || seen[h.mount] || name == "name=systemd" {
			continue
		}
		seen[h.mount] = true
		mounts = append(mounts, h.mount)
	}
	return mounts
}

// unnoted finds the holders of a sandbox whose start was cut off before anybody
// could note the process.
func (b *Backend) unnoted(id string) (found []backend.Process) {
	want := strings.Join(holderArgs(id), "\x00") + "\x00"
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is right
	for _, f := range files {
		args, err := os.ReadFile(f)
		if err != nil || string(args) != want {
			continue
		}
		dir := filepath.Dir(f)
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if err != nil || filepath.Dir(exe) != b.dir { // another state folder's
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if st, err := proc.ReadStat(pid); err == nil {
			found = append(found, backend.Process{Pid: pid, Start: st.Start})
		}
	}
	return found
}

// StopSandbox is part of backend.Backend.
func (b *Backend) StopSandbox(ctx context.Context, s *backend.SandboxSpec, p backend.Process) error {
	var holders []backend.Process
	switch {
	case p.Pid != 0:
		holders = []backend.Process{p}
	case s.SharePID:
		holders = b.unnoted(s.ID)
	}
	for _, p := range holders {
		err := proc.Signal(p.Pid, p.Start, unix.SIGKILL)
		if err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		if err == nil {
			if err := awaitGone(ctx, p.Pid); err != nil {
				return fmt.Errorf("wait for the end of the holder: %w", err)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(s.Dir, madeCgroup)); err == nil && s.CgroupPath != "" {
		for _, mount := range cgroupMounts() {
			// Busy when containers are still in it: whoever made those removes it.
			_ = os.Remove(filepath.Join(mount, s.CgroupPath))
		}
	}
	return nil
}
