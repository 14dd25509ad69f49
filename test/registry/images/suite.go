package images

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const passwd = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n"
const group = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nwww-data:x:33:\nnogroup:x:65534:\n"

// layers are what the images of the suite are put together from.
type layers struct {
	base, web80, web12003, pause, nonewprivs v1.Layer
	predefined                               v1.Layer
}

// suite builds every image that critest v1.36.0 names, under the path it names.
func (b *Builder) suite(ctx context.Context) (Set, error) {
	l, err := b.layers(ctx)
	if err != nil {
		return nil, err
	}
	s := make(Set)
	// put keeps the first error, so that the list below stays a list.
	var failed error
	put := func(ref string, cfg v1.Config, ls ...v1.Layer) {
		img, err := image(cfg, ls...)
		if err != nil && failed == nil {
			failed = fmt.Errorf("image %s: %w", ref, err)
		}
		s[ref] = img
	}
	// marked images differ from the base in one file, so that each has its own ID.
	marked := func(ref, mark string) {
		m, err := tree{"/test-marker": text(mark)}.layer()
		if err != nil && failed == nil {
			failed = err
		}
		put(ref, v1.Config{Cmd: []string{"sh"}}, l.base, m)
	}
	sh := v1.Config{Cmd: []string{"sh"}}
	web := v1.Config{Cmd: []string{"nginx", "-g", "daemon off;"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}}
	put("e2e-test-images/busybox:1.29-2", sh, l.base)
	put("library/busybox:latest", sh, l.base)
	put("e2e-test-images/nginx:1.14-2", web, l.base, l.web80)
	put("library/nginx:latest", web, l.base, l.web80)
	// A spec waits for the word httpd in this one's log.
	put("e2e-test-images/httpd:2.4.39-4", v1.Config{Cmd: []string{"sh", "-c", "echo httpd; exec nginx -g 'daemon off;'"}}, l.base, l.web80)
	put("e2e-test-images/nonewprivs:1.3", v1.Config{Cmd: []string{"nnp"}}, l.base, l.nonewprivs)
	for _, v := range []string{"3.1", "3.6", "3.8", "3.9", "3.10", "3.10.1", "3.10.2"} {
		// The runtime's own sandbox image must not share its ID with the one
		// that the suite removes.
		put("pause:"+v, v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535", Env: []string{"PAUSE=" + v}}, l.pause)
	}
	for _, v := range []string{"1", "1-glibc", "1-musl", "1-uclibc", "1.35.0-glibc"} {
		marked("docker/library/busybox:"+v, v)
	}
	const staging = "k8s-staging-cri-tools/"
	put(staging+"hostnet-nginx-amd64:latest", web, l.base, l.web12003)
	put(staging+"hostnet-nginx-arm64:latest", web, l.base, l.web12003)
	for name, user := range map[string]string{"uid": "1002", "username": "www-data", "uid-group": "1003:www-data", "username-group": "www-data:www-data"} {
		put(staging+"test-image-user-"+name+":latest", v1.Config{Cmd: []string{"sh"}, User: user}, l.base)
	}
	put(staging+"test-image-predefined-group:latest", v1.Config{Cmd: []string{"sh"}, User: "1000"}, l.base, l.predefined)
	marked(staging+"test-image-latest:latest", "latest")
	marked(staging+"test-image-tag:test", "tag-test")
	marked(staging+"test-image-tag:all", "tag-all")
	marked(staging+"test-image-digest:latest", "digest")
	for _, n := range []string{"1", "2", "3"} {
		marked(staging+"test-image-"+n+":latest", "image-"+n)
		marked(staging+"test-image-tags:"+n, "tags")
	}
	return s, failed
}

func (b *Builder) layers(ctx context.Context) (l layers, err error) {
	deb := debian{filepath.Join(b.Cache, "debian")}
	unlock, err := deb.lock()
	if err != nil {
		return l, err
	}
	defer unlock()
	if err := deb.need(ctx, "busybox", "procps", "util-linux", "nginx", "libc6"); err != nil {
		return l, err
	}
	base, err := busybox(ctx, deb)
	if err != nil {
		return l, err
	}
	nginx, err := deb.executable(ctx, "/usr/sbin/nginx")
	if err != nil {
		return l, err
	}
	pause, err := b.pause(ctx)
	if err != nil {
		return l, err
	}
	nnp, err := b.program(ctx, "nonewprivs")
	if err != nil {
		return l, err
	}
	for _, make := range []struct {
		into *v1.Layer
		tree tree
	}{
		{&l.base, base},
		{&l.web80, web(nginx, 80)},
		{&l.web12003, web(nginx, 12003)},
		{&l.pause, tree{"/pause": regular(0o755, pause)}},
		{&l.nonewprivs, tree{"/usr/local/bin/nnp": regular(0o4755, nnp)}},
		{&l.predefined, tree{
			"/etc/passwd": text(passwd + "default-user:x:1000:1000::/home/default-user:/bin/sh\n"),
			"/etc/group":  text(group + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
		}},
	} {
		if *make.into, err = make.tree.layer(); err != nil {
			return l, err
		}
	}
	return l, nil
}

func (b *Builder) pause(ctx context.Context) ([]byte, error) {
	if b.Pause != "" {
		return os.ReadFile(b.Pause)
	}
	return b.program(ctx, "pause")
}

// busybox is the root filesystem that nearly all specs run in. Its busybox is
// the dynamically linked one: the static one of Debian runs its applets without
// looking at the files, which the masked-path spec notices. Applets are hard
// links, because a mask over a link would hide busybox itself. Debian's busybox
// has no pgrep and no ipcs, so the real ones stand in.
func busybox(ctx context.Context, deb debian) (tree, error) {
	t := make(tree)
	for at, from := range map[string][]string{
		"/bin/busybox": {"/bin/busybox", "/usr/bin/busybox"},
		"/bin/pgrep":   {"/usr/bin/pgrep", "/bin/pgrep"},
		"/bin/ipcs":    {"/usr/bin/ipcs", "/bin/ipcs"},
	} {
		files, err := deb.executable(ctx, from...)
		if err != nil {
			return nil, err
		}
		for p, n := range files {
			if strings.HasSuffix(p, "/"+filepath.Base(at)) {
				p = at
			}
			t[p] = n
		}
	}
	applets, err := applets(ctx, t)
	if err != nil {
		return nil, err
	}
	for _, a := range applets {
		if _, taken := t["/bin/"+a]; !taken {
			t["/bin/"+a] = hardlink("/bin/busybox")
		}
	}
	t.add(tree{
		"/root": folder(0o700), "/tmp": folder(0o1777), "/home": folder(0o755),
		"/proc": folder(0o755), "/sys": folder(0o755), "/dev": folder(0o755),
		"/usr/bin": symlink("/bin"), "/sbin": symlink("/bin"), "/usr/local/bin": folder(0o755),
		"/var/run": folder(0o755), "/var/www": folder(0o755),
		"/etc/passwd": text(passwd), "/etc/group": text(group),
	})
	return t, nil
}

// applets asks the busybox of the image, run with the image's own loader and
// libraries: the machine's may be of another release.
func applets(ctx context.Context, t tree) ([]string, error) {
	dir, err := os.MkdirTemp("", "testimage")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	loader := ""
	for p, n := range t {
		base := filepath.Base(p)
		if err := os.WriteFile(filepath.Join(dir, base), n.data, 0o755); err != nil {
			return nil, err
		}
		if strings.HasPrefix(base, "ld-linux") {
			loader = base
		}
	}
	if loader == "" {
		return nil, fmt.Errorf("the busybox package is not dynamically linked")
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, loader), "--library-path", dir, filepath.Join(dir, "busybox"), "--list")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox applets: %w: %s", err, stderr.String())
	}
	return strings.Fields(string(out)), nil
}

func web(nginx tree, port int) tree {
	conf := fmt.Sprintf("user root;\nworker_processes 1;\npid /var/run/nginx.pid;\nevents { worker_connections 64; }\n"+
		"http { access_log /dev/stdout; error_log /dev/stderr; server { listen %d; listen [::]:%d; root /usr/share/nginx/html; } }\n", port, port)
	t := tree{
		"/etc/nginx/nginx.conf":            text(conf),
		"/usr/share/nginx/html/index.html": text("<html><body><h1>Welcome to nginx!</h1></body></html>\n"),
		"/var/log/nginx":                   folder(0o755),
		"/var/lib/nginx":                   folder(0o755),
		"/var/cache/nginx":                 folder(0o755),
		"/run":                             folder(0o755),
	}
	t.add(nginx)
	return t
}
