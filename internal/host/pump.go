package host

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "cloister.dev/api/host/v1"
)

// pump is the streams of a task that another shim runs.
type pump struct {
	op     sync.Mutex // held while the streams are opened or closed
	io     *taskIO
	gone   bool        // guarded by op
	ending atomic.Bool // its record is not to be written any more
}

// opened gives the streams once they are open.
func (p *pump) opened() (*taskIO, error) {
	p.op.Lock()
	defer p.op.Unlock()
	if p.gone {
		return nil, fmt.Errorf("streams of task %q: %w", filepath.Base(p.io.dir), errdefs.ErrNotFound)
	}
	return p.io, nil
}

func (s hostService) OpenIO(_ context.Context, r *hostv1.OpenIORequest) (*hostv1.OpenIOResponse, error) {
	if err := checkID("task", r.Id); err != nil {
		return nil, err
	}
	log := r.GetLog()
	if p := log.GetPath(); p != "" && (!filepath.IsAbs(p) || filepath.Clean(p) != p) {
		return nil, fmt.Errorf("task %s: log path %q is not a clean absolute path: %w", r.Id, p, errdefs.ErrInvalidArgument)
	}
	spec := ioSpec{LogPath: log.GetPath(), MaxLine: log.GetMaxLineBytes(), Stdin: r.Stdin, StdinOnce: r.StdinOnce, Terminal: r.Terminal, External: true}
	p, err := s.h.openPump(r.Id, spec, nil)
	if err != nil {
		return nil, err
	}
	resp := &hostv1.OpenIOResponse{Stdout: p.io.fifo("stdout")}
	if !r.Terminal {
		resp.Stderr = p.io.fifo("stderr")
	}
	if r.Stdin {
		resp.Stdin = p.io.fifo("stdin")
	}
	return resp, nil
}

// openPump opens the streams of a task, once; whoever asks for the same ones
// meanwhile waits until they are open.
func (h *Host) openPump(id string, spec ioSpec, held map[string]*os.File) (*pump, error) {
	p := h.newPump(id, spec)
	for {
		old := h.addPump(id, p)
		if old == nil {
			break
		}
		io, err := old.opened()
		switch {
		case errdefs.IsNotFound(err): // being closed until now
		case io.ioSpec == spec:
			return old, nil // a repeated call
		default:
			return nil, fmt.Errorf("streams of task %q are open already: %w", id, errdefs.ErrAlreadyExists)
		}
	}
	defer p.op.Unlock()
	err := os.MkdirAll(p.io.dir, 0o700)
	if err == nil {
		err = p.save(spec)
	}
	if err == nil {
		err = p.io.open(held)
	}
	if err == nil {
		err = p.io.run(nil, held)
	}
	if err != nil {
		h.dropPump(id, p)
		return nil, fmt.Errorf("open the streams of task %s: %w", id, err)
	}
	return p, nil
}

func (h *Host) newPump(id string, spec ioSpec) *pump {
	p := &pump{io: h.newIO(id, h.pumpDir(id), spec)}
	p.io.name = "p/" + id + "/"
	p.io.stdinClosed = func() {
		closed := spec
		closed.StdinClosed = true
		if p.ending.Load() {
			return
		}
		if err := p.save(closed); err != nil {
			h.log.Warn("pump record not written", "task", id, "err", err)
		}
	}
	return p
}

func (p *pump) save(spec ioSpec) error { return save(filepath.Join(p.io.dir, "pump.json"), spec) }

// addPump puts p into the table with p.op held, unless another one is there.
func (h *Host) addPump(id string, p *pump) (old *pump) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.pumps[id]; old != nil {
		return old
	}
	p.op.Lock() // nobody else knows it
	h.pumps[id] = p
	return nil
}

func (h *Host) recoverPump(_ context.Context, id string, held map[string]*os.File) error {
	var spec ioSpec
	if err := load(filepath.Join(h.pumpDir(id), "pump.json"), &spec); err != nil {
		return err
	}
	_, err := h.openPump(id, spec, held)
	return err
}

func (h *Host) closePump(id string) bool {
	h.mu.Lock()
	p := h.pumps[id]
	h.mu.Unlock()
	if p == nil {
		return false
	}
	p.op.Lock()
	defer p.op.Unlock()
	if p.gone {
		return false
	}
	h.dropPump(id, p)
	return true
}

// dropPump takes everything of a pump away; its op is held.
func (h *Host) dropPump(id string, p *pump) {
	p.ending.Store(true)
	p.io.close()
	if err := os.RemoveAll(p.io.dir); err != nil {
		h.log.Warn("folder of a pump not removed", "task", id, "err", err)
	}
	p.gone = true
	h.mu.Lock()
	delete(h.pumps, id)
	h.mu.Unlock()
}

func (s hostService) CloseIO(_ context.Context, r *hostv1.CloseIORequest) (*emptypb.Empty, error) {
	if !s.h.closePump(r.Id) {
		return nil, fmt.Errorf("streams of task %q: %w", r.Id, errdefs.ErrNotFound)
	}
	return &emptypb.Empty{}, nil
}
