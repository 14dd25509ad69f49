package cri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/image"
	"cloister.dev/internal/pod"
)

// Checker compares what the pod service knows with what is on the machine.
type Checker interface {
	Fsck(ctx context.Context, repair bool) ([]pod.Finding, error)
	Containers() []pod.Container
}

// Keeper looks after the images of the node.
type Keeper interface {
	Get(refOrID string) (image.Image, error)
	Watch(ctx context.Context, ref string, tell func(image.Progress)) error
	Check(ctx context.Context, repair bool) ([]image.Finding, error)
	Prune(ctx context.Context, o image.PruneOptions) ([]image.Pruned, error)
}

// Machinist knows the pods' virtual machines.
type Machinist interface {
	Machines(ctx context.Context, pod string, console bool) ([]pod.Machine, error)
	RunInMachine(ctx context.Context, pod string, args []string) (pod.MachineRun, error)
}

// Debug is the service for Cloister's own command line, on CRI's socket.
type Debug struct {
	debugv1.UnimplementedDebugServer
	Pods    Checker
	Images  Keeper
	Machine Machinist
}

// Register adds the service to g.
func (d *Debug) Register(g *grpc.Server) { debugv1.RegisterDebugServer(g, d) }

// Fsck lists, and with repair removes, what has no owner.
func (d *Debug) Fsck(ctx context.Context, r *debugv1.FsckRequest) (*debugv1.FsckResponse, error) {
	found, err := d.Pods.Fsck(ctx, r.GetRepair())
	if err != nil {
		return nil, err
	}
	resp := &debugv1.FsckResponse{}
	for _, f := range found {
		resp.Findings = append(resp.Findings, &debugv1.Finding{Kind: f.Kind, Id: f.ID, Path: f.Path, Detail: f.Detail, Repaired: f.Repaired, Error: f.Err})
	}
	if !r.GetContent() {
		return resp, nil
	}
	damaged, err := d.Images.Check(ctx, r.GetRepair())
	for _, f := range damaged {
		resp.Findings = append(resp.Findings, &debugv1.Finding{Kind: f.Kind, Id: f.ID, Path: f.Path, Detail: f.Detail, Repaired: f.Repaired, Error: f.Err})
	}
	return resp, err
}

// PruneImages removes images that no container uses, neither as its root file
// system nor as a volume.
func (d *Debug) PruneImages(ctx context.Context, r *debugv1.PruneImagesRequest) (*debugv1.PruneImagesResponse, error) {
	if r.GetOlderThanSeconds() < 0 {
		return nil, fmt.Errorf("an age of %d seconds: %w", r.GetOlderThanSeconds(), errdefs.ErrInvalidArgument)
	}
	pruned, err := d.Images.Prune(ctx, image.PruneOptions{
		InUse: d.inUse, Age: time.Duration(r.GetOlderThanSeconds()) * time.Second, DryRun: r.GetDryRun()})
	resp := &debugv1.PruneImagesResponse{}
	for _, p := range pruned {
		out := &debugv1.PrunedImage{Id: p.Image.ID, Names: append(slices.Clone(p.Image.RepoTags), p.Image.RepoDigests...), Size: p.Image.Size}
		if p.Err != nil {
			out.Error = p.Err.Error()
		}
		resp.Images = append(resp.Images, out)
	}
	return resp, err
}

func (d *Debug) inUse(id string) bool {
	for _, c := range d.Pods.Containers() {
		if c.ImageID == id {
			return true
		}
		for _, m := range c.Config.GetMounts() {
			if ref := m.GetImage().GetImage(); ref != "" {
				if img, err := d.Images.Get(ref); err == nil && img.ID == id {
					return true
				}
			}
		}
	}
	return false
}

// PullProgress follows one pull. Pictures that the client does not take in
// time are overtaken by newer ones.
func (d *Debug) PullProgress(r *debugv1.PullProgressRequest, out grpc.ServerStreamingServer[debugv1.PullProgressResponse]) error {
	latest := make(chan image.Progress, 1)
	done := make(chan error, 1)
	go func() {
		done <- d.Images.Watch(out.Context(), r.GetRef(), func(p image.Progress) {
			select {
			case <-latest:
			default:
			}
			latest <- p // only this goroutine's tracker sends
		})
	}()
	for {
		select {
		case p := <-latest:
			if err := out.Send(pullProgress(p)); err != nil {
				return errors.Join(err, <-done) // the stream's context is over
			}
		case err := <-done:
			select {
			case p := <-latest:
				return out.Send(pullProgress(p))
			default:
				return err
			}
		}
	}
}

func pullProgress(p image.Progress) *debugv1.PullProgressResponse {
	states := map[image.LayerState]debugv1.Layer_State{
		image.LayerWaiting: debugv1.Layer_WAITING, image.LayerDownloading: debugv1.Layer_DOWNLOADING,
		image.LayerDownloaded: debugv1.Layer_DOWNLOADED, image.LayerExtracting: debugv1.Layer_UNPACKING, image.LayerDone: debugv1.Layer_DONE,
	}
	resp := &debugv1.PullProgressResponse{}
	for _, l := range p.Layers {
		resp.Layers = append(resp.Layers, &debugv1.Layer{Digest: l.Digest.String(), State: states[l.State], Offset: l.Offset, Total: l.Total})
	}
	return resp
}

// Machines lists the virtual machines.
func (d *Debug) Machines(ctx context.Context, r *debugv1.MachinesRequest) (*debugv1.MachinesResponse, error) {
	all, err := d.Machine.Machines(ctx, r.GetPod(), r.GetConsole())
	if err != nil {
		return nil, err
	}
	resp := &debugv1.MachinesResponse{}
	for _, m := range all {
		resp.Machines = append(resp.Machines, &debugv1.Machine{Pod: m.Pod, Pid: m.Pid, MachineType: m.Type, Accel: m.Accel, Kernel: m.Kernel,
			Cpus: m.CPUs, Memory: m.Memory, State: m.State, BootMillis: m.BootMillis, Console: m.Console})
	}
	return resp, nil
}

// RunInMachine runs a program of a guest.
func (d *Debug) RunInMachine(ctx context.Context, r *debugv1.RunInMachineRequest) (*debugv1.RunInMachineResponse, error) {
	out, err := d.Machine.RunInMachine(ctx, r.GetPod(), r.GetArgs())
	if err != nil {
		return nil, err
	}
	return &debugv1.RunInMachineResponse{Status: out.Status, Stdout: out.Stdout, Stderr: out.Stderr}, nil
}
