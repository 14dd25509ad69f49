package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// TestMergedPulls holds a layer back while ten callers ask for the image: the
// registry must be asked once, a caller who leaves must not end it, and the
// last one who leaves must.
func TestMergedPulls(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", noise(t, 1<<16))
	ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
	isLayer := isLayerGet(layer)
	asked := make(chan struct{}, 100)
	release := make(chan struct{})
	reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if isLayer(r) {
			asked <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
				return true
			}
		}
		return false
	})
	ctx, cancel := context.WithCancel(context.Background())
	impatient := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, PullRequest{Ref: ref})
		impatient <- err
	}()
	<-asked
	var wg sync.WaitGroup
	errs := make(chan error, 10)
	for range 10 {
		wg.Go(func() {
			_, err := s.Pull(context.Background(), PullRequest{Ref: ref})
			errs <- err
		})
	}
	waitFor(t, "all callers to join", func() bool {
		s.flights.mu.Lock()
		defer s.flights.mu.Unlock()
		for _, f := range s.flights.byID {
			return f.waiters == 11
		}
		return false
	})
	cancel()
	if err := <-impatient; !errors.Is(err, context.Canceled) {
		t.Errorf("impatient caller: %v", err)
	}
	close(release)
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	if n := reg.seen(isLayer); n != 1 {
		t.Errorf("layer asked for %d times", n)
	}
}

func TestLastCallerCancels(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", noise(t, 1<<16))
	ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
	isLayer := isLayerGet(layer)
	asked, gone := make(chan struct{}, 1), make(chan struct{})
	reg.fault(func(_ http.ResponseWriter, r *http.Request) bool {
		if isLayer(r) {
			asked <- struct{}{}
			<-r.Context().Done()
			close(gone)
		}
		return false
	})
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-asked; cancel() }()
	if _, err := s.Pull(ctx, PullRequest{Ref: ref}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Fatal("the request goes on after the last caller left")
	}
	waitFor(t, "the extraction snapshot to go", func() bool {
		if err := s.collectNow(context.Background()); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(filepath.Join(s.snapshotDir(snapshotterOverlay), "snapshots"))
		return err == nil && len(left) == 0
	})
	ctx, stop := context.WithTimeout(context.Background(), time.Nanosecond)
	defer stop()
	<-ctx.Done()
	if _, err := s.Pull(ctx, PullRequest{Ref: ref}); !isDeadline(err) {
		t.Errorf("pull with a dead context: %v", err)
	}
}

func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cutter answers layer requests with half of what is left, and then cuts the
// connection; ranged says whether it sends parts.
func cutter(t *testing.T, layer v1.Layer, cut func() bool) func(http.ResponseWriter, *http.Request) bool {
	isLayer := isLayerGet(layer)
	rc, err := layer.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	var body bytes.Buffer
	if _, err := body.ReadFrom(rc); err != nil {
		t.Fatal(err)
	}
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !isLayer(r) {
			return false
		}
		if !cut() {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body.Bytes()))
			return true
		}
		if r.Header.Get("Range") != "" {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Length", fmt.Sprint(body.Len()))
		_, _ = w.Write(body.Bytes()[:body.Len()/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

// TestResume cuts the connection in the middle of a layer: the next pull asks
// only for the rest, in the same store and after a restart.
func TestResume(t *testing.T) {
	for _, reopen := range []bool{false, true} {
		t.Run(fmt.Sprintf("reopen=%v", reopen), func(t *testing.T) {
			reg := newRegistry(t)
			root := t.TempDir()
			s := openStore(t, func(o *Options) { o.Root = root })
			layer := fileLayer(t, "f", noise(t, 1<<20))
			ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
			reg.fault(cutter(t, layer, func() bool { return true }))
			_, err := s.Pull(context.Background(), PullRequest{Ref: ref})
			if !errdefs.IsUnavailable(err) {
				t.Fatalf("error %v", err)
			}
			if err := s.collectNow(context.Background()); err != nil {
				t.Fatal(err)
			}
			if reopen {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = openStore(t, func(o *Options) { o.Root = root })
			}
			reg.fault(cutter(t, layer, func() bool { return false }))
			mustPull(t, s, ref)
			isLayer := isLayerGet(layer)
			if n := reg.seen(func(r *http.Request) bool { return isLayer(r) && strings.HasPrefix(r.Header.Get("Range"), "bytes=") }); n != 1 {
				t.Errorf("%d ranged requests", n)
			}
			if n := reg.seen(isLayer); n != 1 {
				t.Errorf("%d requests for the layer", n)
			}
			left, err := s.leases.List(s.ctx)
			if err != nil || len(left) > 0 {
				t.Errorf("leases left: %v %v", left, err)
			}
		})
	}
}

// TestPoisonedPart resumes a part that another registry lied about.
func TestPoisonedPart(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", noise(t, 1<<20))
	ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
	isLayer := isLayerGet(layer)
	size, _ := layer.Size()
	reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if !isLayer(r) {
			return false
		}
		if r.Header.Get("Range") == "" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			_, _ = w.Write(make([]byte, size/2))
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	})
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref}); err == nil {
		t.Fatal("no error")
	}
	reg.fault(cutter(t, layer, func() bool { return false }))
	mustPull(t, s, ref)
	if n := reg.seen(isLayer); n != 2 {
		t.Errorf("%d requests for the layer, want one for the rest and one for all", n)
	}
}

// TestFailedPullIsForgotten lets the lease of a failed pull expire.
func TestFailedPullIsForgotten(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", noise(t, 1<<20))
	ref := reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "g", noise(t, 1000)), layer))
	reg.fault(cutter(t, layer, func() bool { return true }))
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref}); err == nil {
		t.Fatal("no error")
	}
	ctx := s.within(context.Background())
	list, err := s.leases.List(ctx)
	if err != nil || len(list) != 1 || !strings.HasPrefix(list[0].ID, leaseResume) {
		t.Fatalf("leases %v %v", list, err)
	}
	at, err := time.Parse(time.RFC3339, list[0].Labels[labelExpire])
	if err != nil || time.Until(at) > time.Hour || time.Until(at) < time.Minute {
		t.Errorf("lease ends in %v", time.Until(at))
	}
	if !s.gc.expiring() {
		t.Error("nobody looks after the lease")
	}
	// Without the lease, which is what its end means to the collector, nothing
	// of the pull may stay.
	if err := s.endLeases(ctx, list[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.collectNow(ctx); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"content/blobs/sha256", "content/ingest", "snapshots/overlayfs/snapshots"} {
		left, err := os.ReadDir(filepath.Join(s.o.Root, dir))
		if err != nil && !os.IsNotExist(err) || len(left) > 0 {
			t.Errorf("%s: %v %v", dir, left, err)
		}
	}
}

func TestIndexAndPlatforms(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	native := imageOf(t, nil, fileLayer(t, "f", []byte("native")))
	other := imageOf(t, func(c *v1.ConfigFile) { c.Architecture = "s390x" }, fileLayer(t, "f", []byte("other")))
	attestation := imageOf(t, func(c *v1.ConfigFile) { c.OS, c.Architecture = "unknown", "unknown" }, fileLayer(t, "f", []byte("a")))
	add := func(img v1.Image, arch string) mutate.IndexAddendum {
		reg.push(t, "app", "x-"+arch, img)
		os := "linux"
		if arch == "unknown" {
			os = arch
		}
		return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: arch}}}
	}
	idx := mutate.AppendManifests(empty.Index, add(attestation, "unknown"), add(other, "s390x"), add(native, nativeArch()))
	raw, err := idx.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	mt, _ := idx.MediaType()
	d := reg.manifest(t, "app", "all", string(mt), raw)
	ref := reg.host + "/app:all"

	img := mustPull(t, s, ref)
	if img.ID != idOf(t, native) || img.Target.String() != d {
		t.Errorf("image %s of %s", img.ID, img.Target)
	}
	if want := []string{reg.host + "/app@" + d}; !slices.Equal(img.RepoDigests, want) {
		t.Errorf("digests %v", img.RepoDigests)
	}
	foreign, err := s.Pull(context.Background(), PullRequest{Ref: reg.host + "/app@" + digestOf(t, other), Platform: "linux/s390x"})
	if err != nil || foreign.ID != idOf(t, other) || len(foreign.RepoTags) != 0 || len(foreign.RepoDigests) != 1 {
		t.Errorf("foreign %+v %v", foreign, err)
	}
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref, Platform: "linux/riscv64"}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "s390x") {
		t.Errorf("riscv64: %v", err)
	}
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref, Platform: "%%%"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad platform: %v", err)
	}
}

// TestTagMoves pulls a tag again after it moved: the old image keeps its digest
// and loses the tag.
func TestTagMoves(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	first := imageOf(t, nil, fileLayer(t, "f", []byte("1")))
	second := imageOf(t, nil, fileLayer(t, "f", []byte("2")))
	ref := reg.push(t, "app", "latest", first)
	mustPull(t, s, ref)
	reg.push(t, "app", "latest", second)
	if img := mustPull(t, s, strings.TrimSuffix(ref, ":latest")); img.ID != idOf(t, second) {
		t.Errorf("pulled %s", img.ID)
	}
	old, err := s.Get(idOf(t, first))
	if err != nil || len(old.RepoTags) != 0 || len(old.RepoDigests) != 1 {
		t.Errorf("old image %+v %v", old, err)
	}
}

func TestReopen(t *testing.T) {
	reg := newRegistry(t)
	root := t.TempDir()
	edit := func(o *Options) { o.Root, o.Pinned = root, []string{reg.host + "/pause:1"} }
	s := openStore(t, edit)
	pause := mustPull(t, s, reg.push(t, "pause", "1", imageOf(t, nil, fileLayer(t, "pause", []byte("p")))))
	app := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "app", []byte("a")))))
	if !pause.Pinned || app.Pinned {
		t.Errorf("pinned: %v %v", pause.Pinned, app.Pinned)
	}
	if _, err := s.PrepareRootfs(context.Background(), "c1", app, RootfsOptions{Volatile: true}); err != nil {
		t.Fatal(err)
	}
	before := s.List()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, func(o *Options) { o.Root = root })
	after := s.List()
	if len(after) != 2 {
		t.Fatalf("%d images", len(after))
	}
	for i := range before {
		a, b := before[i], after[i]
		if a.ID != b.ID || a.Size != b.Size || a.ChainID != b.ChainID || !slices.Equal(a.RepoTags, b.RepoTags) || a.Pinned != b.Pinned || !bytes.Equal(a.ConfigJSON, b.ConfigJSON) {
			t.Errorf("%+v became %+v", a, b)
		}
	}
	mounts, err := s.RootfsMounts(context.Background(), "c1")
	if err != nil || !slices.Contains(mounts[0].Options, "volatile") {
		t.Errorf("mounts %v %v", mounts, err)
	}
}

func TestDiscardedLayers(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, func(o *Options) { o.DiscardUnpackedLayers = true })
	layer := fileLayer(t, "f", noise(t, 1<<16))
	ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
	img := mustPull(t, s, ref)
	h, _ := layer.Digest()
	waitFor(t, "the layer's blob to go", func() bool {
		_, err := os.Stat(filepath.Join(s.contentDir(), "blobs/sha256", h.Hex))
		return os.IsNotExist(err)
	})
	reg.fault(nil)
	mustPull(t, s, ref)
	if n := reg.seen(isLayerGet(layer)); n != 0 {
		t.Errorf("layer fetched %d times again", n)
	}
	if _, err := s.PrepareRootfs(context.Background(), "c", img, RootfsOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := s.PrepareRootfs(context.Background(), "d", img, RootfsOptions{Snapshotter: snapshotterNative}); !errdefs.IsNotFound(err) {
		t.Errorf("unpack of a discarded layer: %v", err)
	}
}

// TestUnpackOnDemand asks for a snapshotter that the image was not pulled for.
func TestUnpackOnDemand(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	img := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")), fileLayer(t, "g", []byte("y")))))
	mounts, err := s.PrepareRootfs(context.Background(), "c", img, RootfsOptions{Snapshotter: snapshotterNative})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(mounts[0].Source, "f")); err != nil || string(b) != "x" {
		t.Errorf("f: %q %v", b, err)
	}
	if _, err := s.PrepareRootfs(context.Background(), "d", img, RootfsOptions{Snapshotter: "zfs"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown snapshotter: %v", err)
	}
}

func TestProgress(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	a, b := fileLayer(t, "a", noise(t, 1<<18)), fileLayer(t, "b", noise(t, 1<<18))
	ref := reg.push(t, "app", "1", imageOf(t, nil, a, b))
	var mu sync.Mutex
	var last Progress
	_, err := s.Pull(context.Background(), PullRequest{Ref: ref, Progress: func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		last = p
	}})
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	size, _ := a.Size()
	if last.Ref != ref || len(last.Layers) != 2 || last.Layers[0].State != LayerDone || last.Layers[0].Total != size || last.Layers[0].Offset != size {
		t.Errorf("last progress %+v", last)
	}
}

func TestParallelLimit(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, func(o *Options) { o.MaxConcurrentDownloads = 2 })
	var layers []v1.Layer
	for i := range 8 {
		layers = append(layers, fileLayer(t, fmt.Sprint(i), noise(t, 1000)))
	}
	ref := reg.push(t, "app", "1", imageOf(t, nil, layers...))
	var mu sync.Mutex
	now, most := 0, 0
	paired := make(chan struct{})
	reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		isOne := slices.ContainsFunc(layers, func(l v1.Layer) bool { return isLayerGet(l)(r) })
		if !isOne {
			return false
		}
		mu.Lock()
		now++
		if now > most {
			most = now
		}
		if now == 2 {
			select {
			case <-paired:
			default:
				close(paired)
			}
		}
		mu.Unlock()
		select {
		case <-paired:
		case <-r.Context().Done():
		case <-time.After(5 * time.Second):
		}
		reg.inner.ServeHTTP(w, r)
		mu.Lock()
		now--
		mu.Unlock()
		return true
	})
	mustPull(t, s, ref)
	if most != 2 {
		t.Errorf("%d layers in flight, want 2", most)
	}
}
