package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcopts "github.com/containerd/containerd/api/types/runc/options"
	runtimeopts "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/backend"
)

// newTaskRecord turns a request, from Cloister's daemon or from a stock
// containerd, into a record.
func (h *Host) newTaskRecord(r *taskapi.CreateTaskRequest) (taskRecord, error) {
	rec := taskRecord{Phase: phaseCreating, CreatedAt: time.Now()}
	if err := checkID("task", r.ID); err != nil {
		return rec, err
	}
	if !filepath.IsAbs(r.Bundle) {
		return rec, fmt.Errorf("task %s: bundle %q is not an absolute path: %w", r.ID, r.Bundle, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Stat(filepath.Join(r.Bundle, "config.json")); err != nil {
		return rec, fmt.Errorf("task %s: read the bundle: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
	}
	if r.Checkpoint != "" {
		return rec, fmt.Errorf("task %s: restore from a checkpoint: %w", r.ID, errdefs.ErrNotImplemented)
	}
	rec.Spec = backend.TaskSpec{ID: r.ID, Bundle: r.Bundle, Dir: h.taskDir(r.ID), Terminal: r.Terminal}
	for _, m := range r.Rootfs {
		rec.Spec.Rootfs = append(rec.Spec.Rootfs, backend.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	return rec, rec.readOptions(r)
}

func (rec *taskRecord) readOptions(r *taskapi.CreateTaskRequest) error {
	var own hostv1.TaskOptions
	var runc runcopts.Options
	switch {
	case r.Options == nil:
	case isType(r.Options, &own):
		if err := proto.Unmarshal(r.Options.Value, &own); err != nil {
			return fmt.Errorf("task %s: options: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
		}
		if r.Stdin != "" || r.Stdout != "" || r.Stderr != "" {
			return fmt.Errorf("task %s: the shim owns the streams, so the request must not name any: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		return rec.readOwn(&own)
	case isType(r.Options, &runc):
		if err := proto.Unmarshal(r.Options.Value, &runc); err != nil {
			return fmt.Errorf("task %s: options: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
		}
	case isType(r.Options, &runtimeopts.Options{}): // containerd's for any shim; they were read when the sandbox was made
	default:
		return fmt.Errorf("task %s: options of type %q are not known here: %w", r.ID, r.Options.TypeUrl, errdefs.ErrInvalidArgument)
	}
	rec.Spec.Runtime = backend.Runtime{Binary: runc.BinaryName, Root: runc.Root, SystemdCgroup: runc.SystemdCgroup,
		NoNewKeyring: runc.NoNewKeyring, NoPivotRoot: runc.NoPivotRoot}
	rec.IO.Client = &clientIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	return nil
}

func (rec *taskRecord) readOwn(o *hostv1.TaskOptions) error {
	s := &rec.Spec
	s.Runtime = backend.Runtime{Binary: o.BinaryName, Root: o.Root, SystemdCgroup: o.SystemdCgroup, NoNewKeyring: o.NoNewKeyring,
		NoPivotRoot: o.NoPivotRoot, NoCgroup: o.NoCgroup}
	s.RunOnStart, s.Sandbox, s.TargetTask = o.RunOnStart, o.SandboxId, o.TargetTask
	log := o.GetLog()
	if p := log.GetPath(); p != "" && (!filepath.IsAbs(p) || filepath.Clean(p) != p) {
		return fmt.Errorf("task %s: log path %q is not a clean absolute path: %w", s.ID, p, errdefs.ErrInvalidArgument)
	}
	rec.IO = ioSpec{LogPath: log.GetPath(), MaxLine: log.GetMaxLineBytes(), Stdin: o.Stdin, StdinOnce: o.StdinOnce,
		Terminal: s.Terminal, UID: o.IoUid, GID: o.IoGid}
	return nil
}

// isType compares the full name, whatever precedes it in the URL.
func isType(a *anypb.Any, m proto.Message) bool {
	name := a.TypeUrl
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		name = name[i+1:]
	}
	return name == string(m.ProtoReflect().Descriptor().FullName())
}

// execProcess checks the process of an exec and makes its terminal agree with
// the request.
func execProcess(b []byte, terminal bool) (json.RawMessage, error) {
	var p map[string]json.RawMessage
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("exec: the process is not an OCI process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var args []string
	if err := json.Unmarshal(p["args"], &args); err != nil || len(args) == 0 {
		return nil, fmt.Errorf("exec: no command given: %w", errdefs.ErrInvalidArgument)
	}
	p["terminal"] = json.RawMessage("false")
	if terminal {
		p["terminal"] = json.RawMessage("true")
	}
	return json.Marshal(p)
}
