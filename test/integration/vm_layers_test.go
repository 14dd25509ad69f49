package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// underRoot lists the files of a node whose names end in a suffix.
func underRoot(t *testing.T, n *testnode.Node, suffix string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(n.Root(), func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, suffix) {
			found = append(found, path)
		}
		if os.IsNotExist(err) {
			return nil // a folder that is removed meanwhile
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// The layers of an image are disks with EROFS in the machine, where they say
// the same as anywhere else; what a container writes is on the node, counted.
func TestMachineLayersAreDisks(t *testing.T) {
	needRoot(t)
	guests, err := guest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := here.start(t.Context(), testnode.Options{Guests: guests, GuestOptions: []string{`image_layers = "erofs"`, "boot_timeout = 180"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closeNode(n); err != nil {
			t.Error(err)
		}
	})
	img, err := mutate.AppendLayers(here.base(t),
		layer(t, []file{{path: "data/"}, {path: "data/old", data: []byte("old")}, {path: "data/sub/"}, {path: "data/sub/x", data: []byte("x")},
			{path: "gone", data: []byte("gone")}, {path: "kept", data: []byte("kept")}, {path: "link", link: "kept"}, {path: "folder/"}, {path: "folder/file", data: []byte("1")}}),
		layer(t, []file{{path: ".wh.gone"}, {path: "data/"}, {path: "data/.wh..wh..opq"}, {path: "data/new", data: []byte("new")}}))
	if err != nil {
		t.Fatal(err)
	}
	ref := push(t, img)
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	p := runMachine(t, n)
	c := p.create(ref, []string{"sleep", "1000"})
	c.start()
	for _, told := range [][2]string{
		{"grep -c ' / overlay ' /proc/mounts", "1"},
		{"cat /kept /link; test -e /gone || echo; ls /data", "keptkept\nnew"},
		{"rm /kept && echo new >/kept && cat /link", "new"},
		{"chown -h 7:7 /link && stat -c %u /link", "7"},
		{"mv /folder /moved && cat /moved/file && test ! -e /folder && echo .", "1."},
		{"rm -r /data && mkdir /data && ls /data && echo empty", "empty"},
		{"mkfifo /pipe && ln /kept /hard && ln -s /x /soft && stat -c %h /hard", "2"},
		{"chmod 4755 /bin/busybox && stat -c %a /bin/busybox", "4755"},
		{"head -c 3000000 /dev/zero >/large && wc -c </large", "3000000"},
		{"echo appended >>/etc/group && tail -n 1 /etc/group", "appended"},
		{"ls /sys/block | grep -c sd", fmt.Sprint(len(layers))},
		{"touch -d '2001-01-01 00:00' /old && touch /a && test /a -nt /old && echo newer; stat -c %Y /bin/ls|wc -l", "newer\n1"},
	} {
		if got := c.run(told[0]); got != told[1] {
			t.Errorf("%s: %q, not %q", told[0], got, told[1])
		}
	}
	eventually(t, 30*time.Second, "what was written is counted", func() bool {
		r, err := n.Runtime.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: c.id})
		used := r.GetStats().GetWritableLayer().GetUsedBytes().GetValue()
		return err == nil && used >= 3_000_000 && used < 30_000_000
	})
	second := p.create(ref, []string{"sleep", "1000"})
	second.start()
	second.says(map[string]string{"cat /kept; ls /data": "keptnew", "ls /sys/block | grep -c sd": fmt.Sprint(len(layers))})
	killShim(t, n)
	second.stop(0)
	second.remove()
	if got := c.run("cat /moved/file /kept; test -e /data/new || echo ."); got != "1new\n." {
		t.Errorf("after the shim was killed the first container reads %q", got)
	}
	if b, err := os.ReadFile("/proc/mounts"); err != nil || strings.Contains(string(b), n.Dir) && strings.Contains(string(b), " erofs ") {
		t.Errorf("the node's kernel mounts a layer: %v", err)
	}
	images := underRoot(t, n, ".erofs")
	if len(images) != len(layers) {
		t.Errorf("there are %d images of %d layers: %v", len(images), len(layers), images)
	}
	c.stop(0)
	c.remove()
	for _, image := range images {
		if holds(n, image) {
			t.Errorf("%s is still plugged in", image)
		}
	}
	p.remove()
	if err := removeImage(n, ref); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the images go with the layers", func() bool { return len(underRoot(t, n, ".erofs")) <= 1 })
}
