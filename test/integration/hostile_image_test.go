package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// Links in an image that lead to the node lead nowhere: nothing of the node is
// read, written or made.
func TestImageLinksLeadNowhere(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	trap := t.TempDir()
	victim := filepath.Join(trap, "victim")
	if err := os.WriteFile(victim, []byte("root:x:0:0::/:/bin/sh\nnode:x:4321:4321::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	check := noLeak(t, n)
	for _, target := range []string{victim, up + victim} {
		ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/vol": {}, "/volume/in": {}} },
			file{path: "/etc/resolv.conf", link: target},
			file{path: "/etc/hostname", link: target},
			file{path: "/etc/hosts", link: target},
			file{path: "/etc/passwd", link: target},
			file{path: "/etc/group", link: target},
			file{path: "/etc/mtab", link: target},
			file{path: "/dev/termination-log", link: target},
			file{path: "/vol", link: filepath.Dir(target)},
			file{path: "/volume", link: filepath.Dir(target)},
		))
		if _, err := pull(t.Context(), n, ref); err != nil {
			t.Fatal(err)
		}
		p := runPod(t, n)
		c := p.create(ref, []string{"sleep", "1000"})
		if err := c.tryStart(); err == nil {
			if got := c.run("cat /vol/victim /volume/victim 2>/dev/null || echo none"); strings.Contains(got, "4321") {
				t.Errorf("a volume shows the node's file: %q", got)
			}
			c.run("echo pwned >/vol/victim; echo pwned >/etc/resolv.conf; echo pwned >/etc/mtab; true")
		} else {
			t.Logf("not started: %v", err)
		}
		named := containerConfig(ref, []string{"sleep", "1000"}, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "node" })
		if _, err := p.tryCreate(t.Context(), named); err == nil {
			t.Error("a user of the node's file was found")
		}
		p.remove()
		if err := removeImage(n, ref); err != nil {
			t.Error(err)
		}
	}
	check()
	data, err := os.ReadFile(victim)
	if err != nil || strings.Contains(string(data), "pwned") || !strings.Contains(string(data), "4321") {
		t.Errorf("the node's file was changed: %q %v", data, err)
	}
	if e := entries(trap); e != 1 {
		t.Errorf("%d files beside the node's file", e-1)
	}
}

func removeImage(n *testnode.Node, ref string) error {
	_, err := n.Image.RemoveImage(context.Background(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return err
}

func TestHostileImageConfigurations(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	p := runPod(t, n)
	check := noLeak(t, n)
	create := func(t *testing.T, change func(*imageConfig)) (*container, error) {
		ref := push(t, hostileImage(t, change))
		if _, err := pull(t.Context(), n, ref); err != nil {
			t.Fatal(err)
		}
		return p.tryCreate(t.Context(), containerConfig(ref, []string{"sleep", "1000"}))
	}
	refused := map[string]func(*imageConfig){
		"4294967296":        func(c *imageConfig) { c.User = "4294967296" },
		"4294967297:0":      func(c *imageConfig) { c.User = "4294967297:0" },
		"-1":                func(c *imageConfig) { c.User = "-1" },
		"0:4294967296":      func(c *imageConfig) { c.User = "0:4294967296" },
		"no-such-user":      func(c *imageConfig) { c.User = "no-such-user" },
		"99999999999999999": func(c *imageConfig) { c.User = "99999999999999999999999" },
		"SIGNONSENSE":       func(c *imageConfig) { c.StopSignal = "SIGNONSENSE" },
	}
	for value, change := range refused {
		t.Run(value, func(t *testing.T) {
			c, err := create(t, change)
			if err == nil {
				defer c.remove()
				if value == "SIGNONSENSE" {
					return // SIGTERM in its place serves as well
				}
				if err = c.tryStart(); err == nil {
					t.Fatalf("it runs as %s", c.run("id"))
				}
			}
			wantOneOf(t, err, []codes.Code{codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition}, strings.TrimSuffix(strings.TrimPrefix(value, "0:"), ":0"))
		})
	}
	taken := map[string]func(*imageConfig){
		"1 MB of labels": func(c *imageConfig) {
			c.Labels = map[string]string{}
			for i := range 1000 {
				c.Labels[fmt.Sprintf("io.kubernetes.cri.l%d", i)] = strings.Repeat("x", 1000)
			}
		},
		"volumes outside": func(c *imageConfig) {
			c.Volumes = map[string]struct{}{"/../../../x": {}, "relative/../../y": {}, "/a//b/./c": {}}
		},
		"environment": func(c *imageConfig) {
			c.Env = append(c.Env, "HOME=/\nevil:x:0:0::/:/bin/sh", "=x", "novalue", "LD_PRELOAD=/no/such.so")
		},
		"working folder": func(c *imageConfig) { c.WorkingDir = "../../../../tmp/it-cwd" },
		"entrypoint":     func(c *imageConfig) { c.Entrypoint = []string{"/no/such/program\n"} },
	}
	for name, change := range taken {
		t.Run(name, func(t *testing.T) {
			c, err := create(t, change)
			if err != nil {
				wantOneOf(t, err, []codes.Code{codes.InvalidArgument, codes.FailedPrecondition})
				return
			}
			defer c.remove()
			if err := c.tryStart(); err != nil {
				t.Logf("not started: %v", err)
				return
			}
			if got := c.run("grep -c evil /etc/passwd || true"); got != "0" {
				t.Errorf("the environment wrote %s lines of passwd", got)
			}
			stats, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
			if err != nil || len(stats.Containers) == 0 {
				t.Errorf("list: %v", err)
			}
		})
	}
	for _, path := range []string{"/x", "/y", "/tmp/it-cwd"} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was made on the node", path)
		}
	}
	check()
}

// An image whose layers try to leave their folder is unpacked inside or not
// at all.
func TestHostileLayers(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	trap := t.TempDir()
	for name, files := range map[string][]file{
		"climbing name":    {{path: strings.Repeat("../", 20) + trap + "/climbed", data: []byte("x")}},
		"through a link":   {{path: "/out", link: trap}, {path: "/out/linked", data: []byte("x")}},
		"through up links": {{path: "/out", link: strings.Repeat("../", 20) + trap}, {path: "/out/linked", data: []byte("x")}},
		"whiteout":         {{path: "/out", link: trap}, {path: "/out/.wh.keep"}},
		"opaque":           {{path: "/out", link: filepath.Dir(trap)}, {path: "/out/" + filepath.Base(trap) + "/.wh..wh..opq"}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(trap, "keep"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			ref := push(t, hostileImage(t, nil, files...))
			if _, err := pull(t.Context(), n, ref); err != nil {
				t.Logf("not pulled: %v", err)
			}
			if e := entries(trap); e != 1 {
				t.Errorf("%d files on the node, not 1", e)
			}
			if _, err := os.Stat(filepath.Join(trap, "keep")); err != nil {
				t.Error(err)
			}
		})
	}
}

// Links that stay inside are what images really have.
func TestVolumeThroughALink(t *testing.T) {
	n := shared(t)
	ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/link/data": {}} },
		file{path: "/real/"}, file{path: "/real/data/"}, file{path: "/real/data/file", data: []byte("content")}, file{path: "/link", link: "/real"}))
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	c := runPod(t, n).create(ref, []string{"sleep", "1000"})
	c.start()
	if got := c.run("cat /link/data/file /real/data/file; echo more >/link/data/more; grep -c ' /real/data ' /proc/mounts"); got != "contentcontent1" {
		t.Errorf("%q", got)
	}
}

// An image that is in use can be removed from the list; its container goes on.
func TestContainerOutlivesItsImage(t *testing.T) {
	n := own(t, testnode.Options{})
	ref := push(t, hostileImage(t, nil, file{path: "/mark", data: []byte("here")}))
	id, err := pull(t.Context(), n, ref)
	if err != nil {
		t.Fatal(err)
	}
	c := runPod(t, n).create(ref, []string{"sleep", "1000"})
	if err := removeImage(n, ref); err != nil {
		t.Fatal(err)
	}
	restart(t, n)
	c.start()
	if got := c.run("cat /mark"); got != "here" {
		t.Errorf("%q", got)
	}
	if st := c.status(); st.ImageId != id {
		t.Errorf("image ID %s, pulled as %s", st.ImageId, id)
	}
	time.Sleep(3 * time.Second) // garbage collection has run by then
	if got := c.run("cat /mark"); got != "here" {
		t.Errorf("after the garbage collection: %q", got)
	}
}

// A VOLUME at a path that leads through a link to nowhere is a folder where
// the link says, inside the container. One that leads over what confines the
// container, or is no folder, is refused with a word on which it is.
func TestVolumeThroughALinkToNowhere(t *testing.T) {
	n := own(t, testnode.Options{Handlers: map[string]string{"runc": "runc", "crun": "crun"}, Default: "runc"})
	climbing := strings.Repeat("../", 8)
	image := func(volumes []string, files ...file) string {
		ref := push(t, hostileImage(t, func(c *imageConfig) {
			c.Volumes = map[string]struct{}{}
			for _, v := range volumes {
				c.Volumes[v] = struct{}{}
			}
		}, files...))
		if _, err := pull(t.Context(), n, ref); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	good := image([]string{"/vol", "/in/data", "/up", "/dir/data"}, file{path: "/vol", link: "/no/where"}, file{path: "/in", link: "nowhere/at/all"},
		file{path: "/up", link: climbing + "tmp/it-up"}, file{path: "/dir", link: climbing + "etc/it-dir"})
	bad := map[string]string{
		"loop":  image([]string{"/loop/data"}, file{path: "/loop", link: "/loop"}),
		"proc":  image([]string{"/vol"}, file{path: "/vol", link: climbing + "proc"}),
		"below": image([]string{"/vol/x"}, file{path: "/vol", link: "/proc/sys"}),
		"root":  image([]string{"/vol"}, file{path: "/vol", link: "/.."}),
		"file":  image([]string{"/vol"}, file{path: "/vol", data: []byte("x")}),
		"under": image([]string{"/vol/x/y"}, file{path: "/vol", data: []byte("x")}),
	}
	for _, handler := range []string{"runc", "crun"} {
		p := runHandlerPod(t, n, handler)
		c := p.create(good, []string{"sleep", "1000"})
		if err := c.tryStart(); err != nil {
			t.Errorf("%s: %v", handler, err)
			continue
		}
		got := c.run("for d in /vol /in/data /up /dir/data; do echo x >$d/file || exit; done; cat /no/where/file /nowhere/at/all/data/file /tmp/it-up/file /etc/it-dir/data/file; grep -c ' /no/where \\| /etc/it-dir/data ' /proc/mounts")
		if want := "x\nx\nx\nx\n2"; got != want {
			t.Errorf("%s: %q, not %q", handler, got, want)
		}
		for name, ref := range bad {
			_, err := p.tryCreate(t.Context(), containerConfig(ref, []string{"true"}))
			if wantError(t, err, codes.InvalidArgument, "volume"); t.Failed() {
				t.Logf("%s: %s: %v", handler, name, err)
			}
		}
	}
	for _, path := range []string{"/no/where", "/nowhere", "/tmp/it-up", "/etc/it-dir"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s was made on the node", path)
		}
	}
}
