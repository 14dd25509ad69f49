package guest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/channel"
)

// dialTime bounds the connection to a program of the pod.
const dialTime = 5 * time.Second

// Dial is part of the service.
func (a *Agent) Dial(ctx context.Context, r *guestv1.DialRequest) (*emptypb.Empty, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dialTime)
	defer cancel()
	var d net.Dialer
	var conn net.Conn
	var err error
	for _, addr := range []string{"127.0.0.1", "::1"} {
		if conn, err = d.DialContext(ctx, "tcp", net.JoinHostPort(addr, strconv.Itoa(int(r.Port)))); err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("connect to port %d in the pod: %w: %w", r.Port, err, errdefs.ErrUnavailable)
	}
	port, err := a.ports.open(ctx, r.PortName)
	if err != nil {
		conn.Close()
		return nil, err
	}
	go channel.Join(conn.(*net.TCPConn), channel.NewDuplex(port)) //nolint:forcetypeassert // the network is tcp
	return &emptypb.Empty{}, nil
}

// maxSaid bounds what Run gives of each stream.
const maxSaid = 1 << 20

// Run is part of the service.
func (a *Agent) Run(ctx context.Context, r *guestv1.RunRequest) (*guestv1.RunResponse, error) {
	if len(r.Args) == 0 {
		return nil, fmt.Errorf("no program given: %w", errdefs.ErrInvalidArgument)
	}
	var outputs [2]*os.File
	for i := range outputs {
		f, err := os.CreateTemp(runDir, "run-")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := os.Remove(f.Name()); err != nil {
			return nil, err
		}
		outputs[i] = f
	}
	path := r.Args[0]
	if !filepath.IsAbs(path) {
		for _, dir := range []string{"/usr/bin", "/bin", "/usr/sbin", "/sbin"} {
			if _, err := os.Stat(filepath.Join(dir, path)); err == nil {
				path = filepath.Join(dir, path)
				break
			}
		}
	}
	exit, err := a.reaper.RunCommand(ctx, proc.Command{Path: path, Args: r.Args, Env: os.Environ(), Dir: "/",
		Files: [3]*os.File{nil, outputs[0], outputs[1]}})
	if err != nil {
		return nil, err
	}
	resp := &guestv1.RunResponse{Status: int32(exit.Status)}
	for i, to := range []*[]byte{&resp.Stdout, &resp.Stderr} {
		if *to, err = io.ReadAll(io.NewSectionReader(outputs[i], 0, maxSaid)); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// Online is part of the service.
func (a *Agent) Online(context.Context, *guestv1.OnlineRequest) (*guestv1.OnlineResponse, error) {
	// The driver by which memory comes and goes, where the machine has it.
	if err := Modprobe("virtio_mem"); err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("load the driver of pluggable memory: %w", err)
	}
	for _, glob := range []string{"/sys/devices/system/cpu/cpu*/online", "/sys/devices/system/memory/memory*/online"} {
		files, err := filepath.Glob(glob)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == "0" {
				if err := os.WriteFile(f, []byte("1"), 0); err != nil {
					return nil, fmt.Errorf("bring what was plugged in up: %w", err)
				}
			}
		}
	}
	resp := &guestv1.OnlineResponse{Cpus: uint32(runtime.NumCPU())}
	var set unix.CPUSet
	if b, err := os.ReadFile("/sys/devices/system/cpu/online"); err == nil {
		resp.Cpus = countCPUs(strings.TrimSpace(string(b)))
	} else if unix.SchedGetaffinity(0, &set) == nil {
		resp.Cpus = uint32(set.Count())
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		resp.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	return resp, nil
}

// countCPUs counts a list such as 0-2,5.
func countCPUs(list string) (n uint32) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, ranged := strings.Cut(part, "-")
		a, err := strconv.Atoi(first)
		b := a
		if ranged && err == nil {
			b, err = strconv.Atoi(last)
		}
		if err == nil && b >= a {
			n += uint32(b - a + 1)
		}
	}
	return n
}

// Metrics is part of the service.
func (a *Agent) Metrics(context.Context, *emptypb.Empty) (*guestv1.MetricsResponse, error) {
	var out bytes.Buffer
	a.mu.Lock()
	fmt.Fprintf(&out, "cloister_guest_tasks %d\n", len(a.tasks))
	a.mu.Unlock()
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			if kb, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				fmt.Fprintf(&out, "cloister_guest_memory_bytes{item=%q} %d\n", strings.TrimSuffix(f[0], ":"), kb<<10)
			}
		}
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 2 {
			for i, over := range []string{"1m", "5m", "15m"} {
				fmt.Fprintf(&out, "cloister_guest_load{over=%q} %s\n", over, f[i])
			}
		}
	}
	if b, err := os.ReadFile("/proc/uptime"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 0 {
			fmt.Fprintf(&out, "cloister_guest_uptime_seconds %s\n", f[0])
		}
	}
	return &guestv1.MetricsResponse{Text: out.Bytes()}, nil
}
