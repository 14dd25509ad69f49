// registry builds the test images and serves them on a loopback address until
// it is ended. When all can be pulled it prints one line to standard output:
//
//	serving N images on HOST:PORT
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"cloister.dev/test/registry/images"
	"cloister.dev/test/registry/registry"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:0", "loopback `address` to serve on; port 0 picks a free one")
	hosts := flag.String("hosts", "", "write _default/hosts.toml into this `folder`, pointing here")
	only := flag.String("only", "", "serve one `set` of images: demo (the small static one, needs no Debian package), bulk (those by which pulls are timed)")
	cache := flag.String("cache", "", "`folder` for what was downloaded and compiled (default: cloister-test in the user's cache folder)")
	pause := flag.String("pause", "", "static `program` to use as pause in place of our own")
	list := flag.Bool("list", false, "print the references and image digests and exit")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	build := images.Builder{Cache: *cache, Pause: *pause}
	if err := run(ctx, &build, *addr, *hosts, *only, *list); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, build *images.Builder, addr, hosts, only string, list bool) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("-addr %s: only loopback addresses are served, there is no access control", addr)
	}
	sets := map[string]func(context.Context) (images.Set, error){"": build.All, "demo": build.Demo, "bulk": build.Bulk}
	make, ok := sets[only]
	if !ok {
		return fmt.Errorf("-only %s: the sets are: demo, bulk", only)
	}
	set, err := make(ctx)
	if err != nil {
		return err
	}
	if list {
		return printDigests(set)
	}
	r, err := registry.Serve(ctx, addr, set)
	if err != nil {
		return err
	}
	if hosts != "" {
		if err := r.WriteHosts(hosts); err != nil {
			return errors.Join(err, r.Close())
		}
	}
	fmt.Printf("serving %d images on %s\n", len(set), r.Addr)
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	return r.Wait()
}
