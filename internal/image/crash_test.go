package image

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const (
	crashRoot = "CLOISTER_IMAGE_CRASH_ROOT"
	crashRef  = "CLOISTER_IMAGE_CRASH_REF"
)

// TestCrashChild is the daemon that TestKilledPull kills; alone it does nothing.
func TestCrashChild(t *testing.T) {
	root, ref := os.Getenv(crashRoot), os.Getenv(crashRef)
	if root == "" {
		t.Skip("runs as a child of TestKilledPull only")
	}
	s, err := Open(context.Background(), Options{Root: root, Hosts: Hosts{ConfigPath: root + "/none"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(context.Background(), PullRequest{Ref: ref, Progress: func(p Progress) {
		if l := p.Layers[0]; l.State != LayerWaiting && l.State != LayerDownloading {
			fmt.Println("first layer is there")
		}
	}})
	fmt.Println("pull ended:", err)
}

// TestKilledPull kills the process while a layer is half there: a new one must
// find no image, resume with a range, and in the end leave no lease and no
// extraction snapshot.
func TestKilledPull(t *testing.T) {
	needRoot(t)
	reg := newRegistry(t)
	root := t.TempDir()
	first, second := fileLayer(t, "a", noise(t, 1<<16)), fileLayer(t, "b", noise(t, 2*smallBlob))
	ref := reg.push(t, "app", "1", imageOf(t, nil, first, second))
	isSecond := isLayerGet(second)
	rc, err := second.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	half := make(chan struct{}, 1)
	reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if !isSecond(r) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		_, _ = w.Write(body[:len(body)/2])
		w.(http.Flusher).Flush()
		half <- struct{}{}
		<-r.Context().Done()
		return true
	})
	child := exec.Command(os.Args[0], "-test.run=^TestCrashChild$", "-test.v")
	child.Env = append(os.Environ(), crashRoot+"="+root, crashRef+"="+ref)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	// The registry's Close waits for the child's request.
	t.Cleanup(func() { _ = child.Process.Kill() })
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			lines <- sc.Text()
		}
	}()
	for l := range lines {
		if strings.HasPrefix(l, "first layer is there") {
			break
		}
	}
	<-half
	waitFor(t, "the first layer and half of the second on disk", func() bool {
		digest, err := first.Digest()
		if err != nil || len(glob(root+"/content/blobs/sha256/"+digest.Hex)) == 0 {
			return false
		}
		var n int64
		for _, dir := range glob(root + "/content/ingest/*/data") {
			if fi, err := os.Stat(dir); err == nil {
				n = max(n, fi.Size())
			}
		}
		return n >= 1<<20 // bytes are written in pieces of a mebibyte
	})
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	for l := range lines {
		if strings.HasPrefix(l, "pull ended") {
			t.Fatal(l)
		}
	}

	reg.fault(cutter(t, second, func() bool { return false }))
	s := openStore(t, func(o *Options) { o.Root = root })
	if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
		t.Errorf("get after the kill: %v", err)
	}
	if err := s.collectNow(context.Background()); err != nil {
		t.Fatal(err)
	}
	img := mustPull(t, s, ref)
	if n := reg.seen(func(r *http.Request) bool { return isSecond(r) && r.Header.Get("Range") != "" }); n != 1 {
		t.Errorf("%d ranged requests for the layer that was half there", n)
	}
	if n := reg.seen(isLayerGet(first)); n != 0 {
		t.Errorf("%d requests for the layer that was there", n)
	}
	if list, err := s.leases.List(s.ctx); err != nil || len(list) > 0 {
		t.Errorf("leases left: %v %v", list, err)
	}
	if err := s.Remove(context.Background(), img.ID); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all to be freed", func() bool {
		return len(glob(root+"/content/blobs/sha256/*")) == 0 && len(glob(root+"/content/ingest/*")) == 0 &&
			len(glob(root+"/snapshots/overlayfs/snapshots/*")) == 0
	})
}

func glob(pattern string) []string {
	m, err := filepath.Glob(pattern)
	if err != nil {
		panic(err)
	}
	return m
}
