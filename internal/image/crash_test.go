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
	"github.com/opencontainers/go-digest"
)

const (
	crashRoot = "CLOISTER_IMAGE_CRASH_ROOT"
	crashRef  = "CLOISTER_IMAGE_CRASH_REF"
	crashBlob = "CLOISTER_IMAGE_CRASH_BLOB"
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
	go func() {
		_, err := s.Pull(context.Background(), PullRequest{Ref: ref})
		fmt.Println("pull ended:", err)
	}()
	waitFor(t, "the first layer", func() bool {
		_, err := s.content.Info(s.ctx, digest.Digest(os.Getenv(crashBlob)))
		return err == nil
	})
	fmt.Println("first layer is there")
	select {} // until it is killed
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
	blob, err := first.Digest()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestCrashChild$", "-test.v")
	child.Env = append(os.Environ(), crashRoot+"="+root, crashRef+"="+ref, crashBlob+"="+blob.String())
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
	there := false
	for l := range lines {
		if there = strings.HasPrefix(l, "first layer is there"); there {
			break
		}
		t.Log(l)
	}
	if !there {
		t.Fatal("the child ended before it was killed")
	}
	<-half
	waitFor(t, "half of the second layer on disk", func() bool {
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

// TestNamelessBeginnings: a kill in the middle of making or removing the folder
// of a blob leaves one that the content store does not see.
func TestNamelessBeginnings(t *testing.T) {
	root := t.TempDir()
	begun := filepath.Join(root, "content/ingest")
	for _, dir := range []string{"empty", "half", "whole"} {
		if err := os.MkdirAll(filepath.Join(begun, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{"half/data": "x", "half/ref": "", "whole/ref": "k8s.io/1/layer-sha256:0", "whole/data": "x", "refetch-1": "x"} {
		if err := os.WriteFile(filepath.Join(begun, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openStore(t, func(o *Options) { o.Root = root })
	for _, name := range []string{"empty", "half", "refetch-1"} {
		if _, err := os.Lstat(filepath.Join(begun, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func glob(pattern string) []string {
	m, err := filepath.Glob(pattern)
	if err != nil {
		panic(err)
	}
	return m
}
