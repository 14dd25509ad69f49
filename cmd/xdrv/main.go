package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"syscall"
	"time"

	"cloister.dev/internal/image"
)

func main() {
	n := flag.Int("n", 10, "")
	hosts := flag.String("hosts", "", "")
	ref := flag.String("ref", "registry.k8s.io/bench/small:1", "")
	prof := flag.String("prof", "", "")
	trash := flag.String("trash", "/tmp/w-regtrash", "")
	snap := flag.String("snap", "", "")
	flag.Parse()
	os.MkdirAll(*trash, 0o755)
	var times []time.Duration
	if *prof != "" {
		f, _ := os.Create(*prof)
		pprof.StartCPUProfile(f)
		defer pprof.StopCPUProfile()
	}
	for i := range *n {
		dir, _ := os.MkdirTemp("/tmp", "clx")
		s, err := image.Open(context.Background(), image.Options{Root: dir, Snapshotter: *snap, Hosts: image.Hosts{ConfigPath: *hosts}})
		if err != nil {
			panic(err)
		}
		syscall.Sync()
		var a, b syscall.Rusage
		syscall.Getrusage(0, &a)
		t := time.Now()
		if _, err := s.Pull(context.Background(), image.PullRequest{Ref: *ref}); err != nil {
			panic(err)
		}
		d := time.Since(t)
		syscall.Getrusage(0, &b)
		fmt.Println(i, d, "user", tv(b.Utime)-tv(a.Utime), "sys", tv(b.Stime)-tv(a.Stime))
		times = append(times, d)
		s.Close()
		os.Rename(dir, filepath.Join(*trash, filepath.Base(dir)))
	}
	slices.Sort(times)
	fmt.Println("min", times[0], "p50", times[len(times)/2])
}

func tv(t syscall.Timeval) time.Duration { return time.Duration(t.Nano()) }
