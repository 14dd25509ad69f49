package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/client"
)

// stopGrace is what a container gets when run is interrupted.
const stopGrace = 10 * time.Second

// runFlags are the flags of run as they were written.
type runFlags struct {
	spec                    client.RunSpec
	env, volumes, published []string
	remove, detach, quiet   bool
	always                  bool // pull, even if the image is here
}

func (a *app) runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run IMAGE [COMMAND [ARG…]]",
		Short: "Run a pod with one container",
		Long: `Makes a pod with one container through the daemon's CRI socket, pulling the
image when it is not here, and exits with the container's exit code; with 125
when the daemon failed, 126 or 127 when the command cannot be run or found.

Where no daemon runs, a private one is started: its own images, its own bridge,
ended afterwards with --rm. On a node with a kubelet, mind that the kubelet
removes pods that it does not know.`,
		Example: `  cloister run --rm busybox echo hello
  cloister run --rm -it --runtime gvisor alpine sh
  cloister run -d --name web -p 8080:80 -v ./site:/usr/share/nginx/html:ro nginx`,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: first(a.complete(imageNames)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.spec.Image, f.spec.Command = args[0], args[1:]
			if err := f.parse(); err != nil {
				return usage(err)
			}
			return runError(a.run(cmd.Context(), f))
		},
	}
	fl := cmd.Flags()
	fl.SetInterspersed(false)
	fl.StringVar(&f.spec.Handler, "runtime", "", "runtime `handler`, such as runc, crun or gvisor (default: the daemon's)")
	fl.StringVar(&f.spec.Name, "name", "", "`name` of the pod and its container")
	fl.BoolVarP(&f.spec.Stdin, "interactive", "i", false, "pass standard input on")
	fl.BoolVarP(&f.spec.TTY, "tty", "t", false, "give the container a terminal")
	fl.BoolVar(&f.remove, "rm", false, "remove the pod when the container has ended")
	fl.BoolVarP(&f.detach, "detach", "d", false, "print the container's id and leave it running")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "`NAME=VALUE`, or NAME for the value here")
	fl.StringArrayVarP(&f.volumes, "volume", "v", nil, "mount `SOURCE:/TARGET[:ro]`")
	fl.StringArrayVarP(&f.published, "publish", "p", nil, "serve `[[IP:]HOSTPORT:]PORT[/PROTOCOL]` on the node")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "no progress")
	fl.BoolVar(&f.always, "pull", false, "pull even if the image is here")
	return cmd
}

// parse turns the flags' text into the specification.
func (f *runFlags) parse() error {
	if f.detach && (f.spec.Stdin || f.spec.TTY || f.remove) {
		return errors.New("--detach does not go with --interactive, --tty or --rm")
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	for _, s := range f.env {
		kv, err := client.ParseEnv(s, os.LookupEnv)
		if err != nil {
			return err
		}
		f.spec.Env = append(f.spec.Env, kv)
	}
	for _, s := range f.volumes {
		m, err := client.ParseMount(s, dir)
		if err != nil {
			return err
		}
		f.spec.Mounts = append(f.spec.Mounts, m)
	}
	for _, s := range f.published {
		p, err := client.ParsePort(s)
		if err != nil {
			return err
		}
		f.spec.Ports = append(f.spec.Ports, p)
	}
	return nil
}

// runError gives an error of run its exit code.
func runError(err error) error {
	var exit *client.ExitError
	switch {
	case err == nil, errors.As(err, &exit):
		return err
	case errors.Is(err, client.ErrCommandNotFound):
		return &codedError{exitNotFound, err}
	case errors.Is(err, client.ErrCommandNotRunnable):
		return &codedError{exitNotRunnable, err}
	}
	return &codedError{exitRunFailed, err}
}

func (a *app) run(ctx context.Context, f runFlags) (err error) {
	c, own, err := a.dialOrStart(ctx, &f.spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.endPrivate(c, own, f.remove), c.Close()) }()
	if err := a.ensure(ctx, c, f); err != nil {
		return err
	}
	r, err := c.CreateRun(ctx, f.spec)
	if err != nil {
		return err
	}
	if f.remove {
		defer func() { err = errors.Join(err, r.Remove(context.WithoutCancel(ctx))) }()
	}
	if f.detach {
		if err := r.Start(ctx); err != nil {
			return errors.Join(err, r.Remove(context.WithoutCancel(ctx)))
		}
		_, err := fmt.Fprintln(a.stdout, r.ContainerID)
		return err
	}
	return a.foreground(ctx, c, r, f)
}

// ensure pulls the image if need be.
func (a *app) ensure(ctx context.Context, c *client.Conn, f runFlags) error {
	here := false
	if !f.always {
		spec := &runtimeapi.ImageSpec{Image: f.spec.Image, RuntimeHandler: f.spec.Handler}
		r, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
		if err != nil {
			return fmt.Errorf("look for image %s: %w", f.spec.Image, err)
		}
		here = r.GetImage() != nil
	}
	if here {
		return nil
	}
	_, err := a.pull(f.quiet, f.spec.Image, func(progress func([]*debugv1.Layer)) (string, error) {
		return c.Pull(ctx, f.spec.Image, f.spec.Handler, progress)
	})
	return err
}

// foreground runs the container on this process's streams and gives its exit
// code as an error.
func (a *app) foreground(ctx context.Context, c *client.Conn, r *client.Run, f runFlags) error {
	if err := r.Start(ctx); err != nil {
		if f.remove {
			return err
		}
		return errors.Join(err, r.Remove(context.WithoutCancel(ctx)))
	}
	// An interruption stops the container; what it still writes is shown.
	life := context.WithoutCancel(ctx)
	defer context.AfterFunc(ctx, func() {
		if err := r.Stop(life, stopGrace); err != nil {
			fmt.Fprintln(a.stderr, "cloister:", client.Sentence(err))
		}
	})()
	var err error
	if f.spec.TTY {
		err = a.attach(life, c, r, f)
	} else {
		err = a.follow(life, c, r, f)
	}
	if err != nil {
		return err
	}
	st, err := c.WaitExit(life, r.ContainerID)
	if err != nil {
		return err
	}
	if st.GetExitCode() != 0 {
		return &client.ExitError{Code: int(st.GetExitCode())}
	}
	return nil
}

// attach gives the container this terminal. A container that ended before
// that is shown by its log.
func (a *app) attach(ctx context.Context, c *client.Conn, r *client.Run, f runFlags) error {
	url, err := r.AttachURL(ctx, f.spec.Stdin, true, true)
	if err == nil {
		if err = a.stream(ctx, url, f.spec.Stdin, true); err == nil {
			return nil
		}
	}
	if st, statusErr := c.ContainerStatus(ctx, r.ContainerID); statusErr != nil || st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		return errors.Join(err, statusErr)
	}
	return client.Logs(ctx, r.LogPath, client.LogOptions{Tail: -1}, a.stdout, a.stderr)
}

// follow shows the log, of which nothing is lost however short the container
// lives, and passes standard input on beside it.
func (a *app) follow(ctx context.Context, c *client.Conn, r *client.Run, f runFlags) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if f.spec.Stdin {
		url, err := r.AttachURL(ctx, true, false, false)
		if err == nil {
			// Its verdict says nothing that the exit status does not.
			go func() { _ = client.Stream(ctx, url, client.Streams{Stdin: a.stdin}) }()
		} else if st, e := c.ContainerStatus(ctx, r.ContainerID); e != nil || st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			return errors.Join(err, e)
		}
	}
	done := make(chan struct{})
	var waitErr error
	go func() {
		defer close(done)
		_, waitErr = c.WaitExit(ctx, r.ContainerID)
	}()
	err := client.Logs(ctx, r.LogPath, client.LogOptions{Follow: true, Done: done, Tail: -1}, a.stdout, a.stderr)
	if err != nil {
		cancel()
	}
	<-done
	return errors.Join(err, waitErr)
}
