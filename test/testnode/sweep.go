package testnode

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// removePods stops and removes every pod through the CRI, eight at a time.
func (n *Node) removePods(ctx context.Context) error {
	list, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("clean up: list pods: %w", err)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
		slot = make(chan struct{}, 8)
	)
	for _, p := range list.Items {
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			_, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id})
			if err == nil {
				_, err = n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id})
			}
			if err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("clean up pod %s: %w", p.Metadata.GetName(), err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Processes lists the processes that belong to this node by their argument
// vector: daemon, shims and what they keep beside them. Containers are not
// among them, they carry their own arguments.
func (n *Node) Processes() []int {
	return processes(func(pid string) bool {
		cmdline, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		return err == nil && bytes.Contains(cmdline, []byte(n.Dir+"/"))
	})
}

// contained lists processes that live in a mount namespace of their own whose
// root lies in this node's folders.
func (n *Node) contained() []int {
	own, _ := os.Readlink("/proc/self/ns/mnt")
	return processes(func(pid string) bool {
		ns, err := os.Readlink(filepath.Join("/proc", pid, "ns/mnt"))
		if err != nil || ns == own {
			return false
		}
		mounts, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
		return err == nil && rootedIn(string(mounts), n.Dir+"/")
	})
}

// rootedIn tells whether all that is mounted shows that a process lives in a
// container of the folder. One that sees mount points below the folder is not
// in a container yet, and may be another node's.
func rootedIn(mountinfo, dir string) bool {
	found := false
	for line := range strings.Lines(mountinfo) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir) {
			return false
		}
		found = found || strings.Contains(line, dir)
	}
	return found
}

func processes(belongs func(pid string) bool) []int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var pids []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err == nil && pid != os.Getpid() && belongs(filepath.Base(d)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// sweep ends what is left of the node: shims, containers, mounts, the bridge.
func (n *Node) sweep() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := append(n.Processes(), n.contained()...)
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("clean up: processes %v do not end", pids)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may just have ended
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // /proc sends no event for processes that are not ours
	}
	removeCgroups(filepath.Base(n.Dir))
	var errs []error
	if err := unmountBelow(n.Dir); err != nil {
		errs = append(errs, err)
	}
	if link, err := netlink.LinkByName(n.bridge); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	return errors.Join(append(errs, n.dropTables())...)
}

// dropTables deletes the nftables tables of this node, which a daemon leaves
// when it ends because its pods may go on.
func (n *Node) dropTables() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("clean up: list nftables: %w", err)
	}
	sum := sha256.Sum256([]byte(filepath.Join(n.Root(), "network")))
	own := []string{n.bridge, "cloister-cni-" + hex.EncodeToString(sum[:4])}
	for _, t := range tables {
		if slices.Contains(own, t.Name) {
			c.DelTable(t)
		}
	}
	return c.Flush()
}

// removeCgroups removes the cgroups that tests made under the folder's name,
// in every hierarchy, the innermost first.
func removeCgroups(name string) {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, top := range append(tops, "/sys/fs/cgroup/"+name) {
		var dirs []string
		_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // there may be none in this hierarchy
		})
		slices.Reverse(dirs)
		for _, d := range dirs {
			_ = os.Remove(d) // one that is in use says more in a test's own count
		}
	}
}

// unmountBelow detaches every mount in dir, the last made first.
func unmountBelow(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	var points []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append(points, fields[4])
		}
	}
	slices.Reverse(points)
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("clean up: unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// LogTail returns the last lines of the daemon's log.
func (n *Node) LogTail(lines int) string {
	b, err := os.ReadFile(filepath.Join(n.Dir, "daemon.log"))
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
