// Command testinit is the first program of a guest under test. It loads the
// modules, finds the serial port "test" and obeys it: a command with arguments
// is a line, parted by tabs; the answer is a line "ok" or "no", a tab and text
// whose line ends are written as zero bytes.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range [][3]string{{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}} {
		check(os.MkdirAll(m[1], 0o755))
		check(unix.Mount(m[0], m[1], m[2], 0, ""))
	}
	check(os.MkdirAll("/mnt", 0o755))
	cmdline, err := os.ReadFile("/proc/cmdline")
	check(err)
	for param := range strings.FieldsSeq(string(cmdline)) {
		if kind, ok := strings.CutPrefix(param, "cloister.machine="); ok {
			check(loadBoot(kind))
		}
		if what, ok := strings.CutPrefix(param, "test.do="); ok {
			end(what)
		}
	}
	fmt.Println("serving port test")
	for {
		port, err := openPort("test")
		check(err)
		serve(port)
		port.Close()
	}
}

// check ends the guest with a panic of its kernel, whose console is shown.
func check(err error) {
	if err != nil {
		fmt.Println("testinit:", err)
		os.Exit(1)
	}
}

type contents struct {
	Modules map[string]struct {
		Path  string
		Needs []string
	}
}

func readContents() (c contents, err error) {
	b, err := os.ReadFile("/etc/cloister/guest.json")
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	return c, err
}

func loadBoot(kind string) error {
	b, err := os.ReadFile("/etc/cloister/boot-" + kind)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(b)) {
		if err := load(path); err != nil {
			return err
		}
	}
	return modprobe("virtiofs")
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

func modprobe(name string) error {
	c, err := readContents()
	if err != nil {
		return err
	}
	for _, n := range append(c.Modules[name].Needs, name) {
		if err := load(c.Modules[n].Path); err != nil {
			return err
		}
	}
	return nil
}

// openPort waits until the host has plugged the port.
func openPort(name string) (*os.File, error) {
	for {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, path := range names {
			b, err := os.ReadFile(path)
			if err == nil && strings.TrimSpace(string(b)) == name {
				dev := "/dev/" + filepath.Base(filepath.Dir(path))
				f, err := os.OpenFile(dev, os.O_RDWR, 0)
				if err == nil {
					return f, nil
				}
			}
		}
		time.Sleep(2 * time.Millisecond) //nolint:forbidigo // sysfs tells of a new port by nothing that could be waited for
	}
}

func serve(port *os.File) {
	fmt.Fprintln(port, "ready")
	lines := bufio.NewScanner(port)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		args := strings.Split(lines.Text(), "\t")
		text, err := obey(args[0], args[1:])
		status := "ok"
		if err != nil {
			status, text = "no", err.Error()
		}
		fmt.Fprintf(port, "%s\t%s\n", status, strings.ReplaceAll(text, "\n", "\x00"))
	}
}

func obey(command string, args []string) (string, error) {
	commands := map[string]func([]string) (string, error){
		"uname": func([]string) (string, error) {
			var u unix.Utsname
			err := unix.Uname(&u)
			return unix.ByteSliceToString(u.Release[:]), err
		},
		"read":  func(a []string) (string, error) { b, err := os.ReadFile(a[0]); return string(b), err },
		"write": func(a []string) (string, error) { return "", os.WriteFile(a[0], []byte(a[1]), 0o644) },
		"ls": func(a []string) (string, error) {
			es, err := os.ReadDir(a[0])
			var names []string
			for _, e := range es {
				names = append(names, e.Name())
			}
			return strings.Join(names, "\n"), err
		},
		"mount":    func(a []string) (string, error) { return "", mount(a[0], a[1], a[2]) },
		"mknod":    func(a []string) (string, error) { return "", mknod(a[0], a[1], a[2]) },
		"modprobe": func(a []string) (string, error) { return "", modprobe(a[0]) },
		"copy":     func(a []string) (string, error) { return copyPorts(a[0], a[1]) },
		"flood":    func(a []string) (string, error) { return flood(a[0], a[1]) },
		"net":      func(a []string) (string, error) { return "", configure(a[0], a[1], a[2], a[3]) },
		"dial":     func(a []string) (string, error) { return dial(a[0]) },
		"listen":   func(a []string) (string, error) { return "", listen(a[0]) },
		"online":   func([]string) (string, error) { return online() },
		"remove":   func(a []string) (string, error) { return "", os.Remove(a[0]) },
		"end":      func(a []string) (string, error) { end(a[0]); return "", nil },
	}
	f, ok := commands[command]
	if !ok {
		return "", fmt.Errorf("unknown command %q", command)
	}
	return f(args)
}

func mount(kind, source, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	return unix.Mount(source, target, kind, 0, "")
}

func mknod(path, major, minor string) error {
	ma, err := strconv.ParseUint(major, 10, 32)
	if err != nil {
		return err
	}
	mi, err := strconv.ParseUint(minor, 10, 32)
	if err != nil {
		return err
	}
	return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(uint32(ma), uint32(mi))))
}

// copyPorts copies from one port to another until the host closes the first.
func copyPorts(from, to string) (string, error) {
	in, err := openPort(from)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := openPort(to)
	if err != nil {
		return "", err
	}
	defer out.Close()
	n, err := io.Copy(struct{ io.Writer }{out}, struct{ io.Reader }{in})
	return strconv.FormatInt(n, 10), err
}

// flood writes so many MiB to a port.
func flood(to, size string) (string, error) {
	n, err := strconv.Atoi(size)
	if err != nil {
		return "", err
	}
	out, err := openPort(to)
	if err != nil {
		return "", err
	}
	defer out.Close()
	began := time.Now()
	block := make([]byte, 1<<20)
	for range n {
		if _, err := out.Write(block); err != nil {
			return "", err
		}
	}
	return time.Since(began).String(), nil
}

// configure gives the interface of a hardware address an address and a
// default route.
func configure(mac, mtu, addr, gateway string) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() != mac {
			continue
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		n, err := strconv.Atoi(mtu)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetMTU(l, n), netlink.LinkSetUp(l), netlink.AddrReplace(l, a)); err != nil {
			return err
		}
		gw, err := netip.ParseAddr(gateway)
		if err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IP(gw.AsSlice())})
	}
	return fmt.Errorf("no interface with the address %s", mac)
}

// dial gives what a server says first.
func dial(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

// listen greets everybody who connects.
func listen(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "hello from the guest")
			c.Close()
		}
	}()
	return nil
}

// online brings processors up that were plugged, and counts all.
func online() (string, error) {
	files, err := filepath.Glob("/sys/devices/system/cpu/cpu*/online")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte("1"), 0); err != nil {
			return "", err
		}
	}
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	return strings.TrimSpace(string(b)), err
}

func end(how string) {
	syscall.Sync()
	switch how {
	case "poweroff":
		check(unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	case "reboot":
		check(unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
	case "panic":
		fmt.Println("about to panic")
		os.Exit(1)
	case "hang":
		select {}
	}
}
