package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

const image = "registry.k8s.io/e2e-test-images/busybox:1.29-2"

// settle is how long a started container may need to install its handlers, and
// settleVM where its processor may be emulated.
const (
	settle   = 100 * time.Millisecond
	settleVM = time.Second
)

// result holds the samples of one subject by operation.
type result struct {
	Samples map[string][]time.Duration
	// PSS of daemon and shims in bytes by number of pods.
	PSS map[int]int64
	// Peak is the daemon's greatest resident size by pull, in bytes.
	Peak   map[string]int64
	Failed string `json:",omitempty"`

	mu sync.Mutex
}

func newResult() *result {
	return &result{Samples: make(map[string][]time.Duration), PSS: make(map[int]int64), Peak: make(map[string]int64)}
}

func (r *result) add(operation string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Samples[operation] = append(r.Samples[operation], d)
}

// bench measures one running node.
type bench struct {
	node    *testnode.Node
	set     settings
	result  *result
	handler string

	mu     sync.Mutex
	serial int
}

// timed runs f and keeps how long it took.
func (b *bench) timed(operation string, f func() error) error {
	start := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", operation, err)
	}
	b.result.add(operation, time.Since(start))
	return nil
}

// prepare pulls the image and warms the daemon with two pods whose times do not count.
func (b *bench) prepare(ctx context.Context) error {
	if _, err := b.node.Image.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}}); err != nil {
		return fmt.Errorf("pull %s: %w", image, err)
	}
	for range 2 {
		p, err := b.runPod(ctx)
		if err != nil {
			return err
		}
		id, err := b.create(ctx, p)
		if err != nil {
			return err
		}
		if err := b.startContainer(ctx, id); err != nil {
			return err
		}
		if err := b.removePod(ctx, p.id); err != nil {
			return err
		}
	}
	return nil
}

type pod struct {
	id     string
	config *cri.PodSandboxConfig
}

func (b *bench) next() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serial++
	return b.serial
}

func (b *bench) podConfig() *cri.PodSandboxConfig {
	name := fmt.Sprintf("bench-%d", b.next())
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		Hostname:     name,
		LogDirectory: filepath.Join(b.node.Dir, "logs", name),
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
		}},
	}
}

func (b *bench) runPod(ctx context.Context) (pod, error) {
	p := pod{config: b.podConfig()}
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return p, err
	}
	r, err := b.node.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: b.handler})
	p.id = r.GetPodSandboxId()
	return p, err
}

func (b *bench) removePod(ctx context.Context, id string) error {
	if _, err := b.node.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := b.node.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

func (b *bench) create(ctx context.Context, p pod) (string, error) {
	name := fmt.Sprintf("c-%d", b.next())
	r, err := b.node.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.id, SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name},
			Image:    &cri.ImageSpec{Image: image},
			Command:  []string{"top"},
			LogPath:  name + ".log",
			Linux:    &cri.LinuxContainerConfig{},
		},
	})
	return r.GetContainerId(), err
}

func (b *bench) startContainer(ctx context.Context, id string) error {
	_, err := b.node.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
	return err
}

// label names an operation measured here; several at once are told apart.
func label(operation string, parallel int) string {
	if parallel > 1 {
		return fmt.Sprintf("%s, %d at once", operation, parallel)
	}
	return operation
}

// pods measures n pods from creation to removal, some at a time.
func (b *bench) pods(ctx context.Context, n, parallel int) error {
	return each(n, parallel, func() error {
		var p pod
		err := b.timed(label("pod create", parallel), func() (err error) {
			p, err = b.runPod(ctx)
			return err
		})
		if err != nil {
			return err
		}
		stopped := time.Now()
		err = b.timed(label("pod stop", parallel), func() error {
			_, err := b.node.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
			return err
		})
		if err != nil {
			return err
		}
		err = b.timed(label("pod remove", parallel), func() error {
			_, err := b.node.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		})
		b.result.add(label("pod stop + remove", parallel), time.Since(stopped))
		return err
	})
}

// containers measures n containers in one pod per worker, one after the other.
func (b *bench) containers(ctx context.Context, n, parallel int) (err error) {
	free := make(chan pod, parallel)
	for range parallel {
		p, err := b.runPod(ctx)
		if err != nil {
			return err
		}
		free <- p
	}
	err = each(n, parallel, func() error {
		p := <-free
		defer func() { free <- p }()
		return b.container(ctx, p, parallel)
	})
	for range parallel {
		err = errors.Join(err, b.removePod(ctx, (<-free).id))
	}
	return err
}

func (b *bench) container(ctx context.Context, p pod, parallel int) error {
	var id string
	begin := time.Now()
	err := b.timed(label("container create", parallel), func() (err error) {
		id, err = b.create(ctx, p)
		return err
	})
	if err != nil {
		return err
	}
	err = b.timed(label("container start", parallel), func() error { return b.startContainer(ctx, id) })
	if err != nil {
		return err
	}
	b.result.add(label("container create + start", parallel), time.Since(begin))
	// The first process of a PID namespace does not even notice SIGTERM before
	// it asked for it, so top gets the time to do so. A faster start would
	// otherwise be punished with a stop that runs into its time-out.
	wait := settle
	if b.handler == vmHandler {
		wait = settleVM
	}
	time.Sleep(wait) //nolint:forbidigo // see above
	err = b.timed(label("container stop", parallel), func() error {
		_, err := b.node.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 10})
		return err
	})
	if err != nil {
		return err
	}
	return b.timed(label("container remove", parallel), func() error {
		_, err := b.node.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
		return err
	})
}

// lists times both list calls while many containers exist that were created
// but not started.
func (b *bench) lists(ctx context.Context) error {
	const perPod = 50
	var all []pod
	for i := 0; i < b.set.List; i += perPod {
		p, err := b.runPod(ctx)
		if err != nil {
			return err
		}
		all = append(all, p)
	}
	var mu sync.Mutex
	made := 0
	err := each(b.set.List, b.set.Parallel, func() error {
		mu.Lock()
		p := all[made/perPod]
		made++
		mu.Unlock()
		_, err := b.create(ctx, p)
		return err
	})
	if err != nil {
		return err
	}
	for range 50 {
		err := b.timed("ListContainers", func() error {
			r, err := b.node.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
			if err == nil && len(r.Containers) != b.set.List {
				err = fmt.Errorf("%d containers listed, %d exist", len(r.Containers), b.set.List)
			}
			return err
		})
		if err != nil {
			return err
		}
		err = b.timed("ListPodSandbox", func() error {
			_, err := b.node.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return err
		})
		if err != nil {
			return err
		}
	}
	return b.drop(ctx, all)
}

func (b *bench) drop(ctx context.Context, all []pod) error {
	var mu sync.Mutex
	return each(len(all), b.set.Parallel, func() error {
		mu.Lock()
		p := all[0]
		all = all[1:]
		mu.Unlock()
		return b.removePod(ctx, p.id)
	})
}

// memory reads the proportional set size of daemon and shims with no pod, with
// half and with all pods running one container each.
func (b *bench) memory(ctx context.Context) error {
	if err := b.readPSS(0); err != nil {
		return err
	}
	var all []pod
	for i := 1; i <= b.set.Memory; i++ {
		p, err := b.runPod(ctx)
		if err != nil {
			return err
		}
		all = append(all, p)
		id, err := b.create(ctx, p)
		if err != nil {
			return err
		}
		if err := b.startContainer(ctx, id); err != nil {
			return err
		}
		if i == b.set.Memory/2 || i == b.set.Memory {
			if err := b.readPSS(i); err != nil {
				return err
			}
		}
	}
	return b.drop(ctx, all)
}

func (b *bench) readPSS(pods int) error {
	var sum int64
	for _, pid := range b.node.Processes() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if errors.Is(err, os.ErrNotExist) {
			continue // ended meanwhile
		}
		if err != nil {
			return err
		}
		for line := range bytes.Lines(text) {
			if f := bytes.Fields(line); len(f) > 1 && string(f[0]) == "Pss:" {
				kb, err := strconv.ParseInt(string(f[1]), 10, 64)
				if err != nil {
					return err
				}
				sum += kb << 10
			}
		}
	}
	b.result.PSS[pods] = sum
	return nil
}

// each runs f n times, some at a time, and returns the first error.
func each(n, parallel int, f func() error) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		first error
	)
	left := make(chan struct{}, n)
	for range n {
		left <- struct{}{}
	}
	close(left)
	for range parallel {
		wg.Go(func() {
			for range left {
				if err := f(); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
					return
				}
			}
		})
	}
	wg.Wait()
	return first
}
