// demo is the program inside cloister.dev/demo:1, the image that `make demo`
// and the fault tests run. It needs nothing but a kernel.
//
//	demo [-n LINES] [-interval D] [-http ADDR] [-exit CODE] [-hold]
//	    prints a banner and LINES numbered lines, serves HTTP on ADDR until
//	    SIGTERM, then exits with CODE. With -http "" it exits after the last line.
//	demo -lines [-n LINES] [-rate R] [-exit CODE] [-hold]
//	    writes only `line 1`, `line 2`, …, R of them a second, without end when
//	    LINES is 0. After the last line, or at SIGTERM, it exits with CODE;
//	    with -hold it waits for SIGTERM after the last line.
//	demo -uname
//	    prints the release of the kernel that it runs on, as uname -r does.
//	demo -fetch URL
//	    GETs URL and prints the body: a client where the image has no curl.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	n := flag.Int("n", 5, "numbered lines to print (with -lines, 0 is without end)")
	interval := flag.Duration("interval", 200*time.Millisecond, "time between two lines")
	addr := flag.String("http", ":8080", "address to serve HTTP on, empty for none")
	code := flag.Int("exit", 0, "exit status")
	lines := flag.Bool("lines", false, "only write numbered lines")
	rate := flag.Float64("rate", 20, "with -lines, lines a second")
	hold := flag.Bool("hold", false, "after the last line wait for SIGTERM")
	fetch := flag.String("fetch", "", "GET this URL, print the body, exit")
	uname := flag.Bool("uname", false, "print the kernel's release, exit")
	flag.Parse()

	if *uname {
		b, err := os.ReadFile("/proc/sys/kernel/osrelease")
		if err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		os.Stdout.Write(b)
		return
	}
	if *fetch != "" {
		if err := get(*fetch); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	if *lines {
		*interval = time.Duration(float64(time.Second) / *rate)
		*addr = ""
	} else {
		banner()
	}
	if *addr != "" {
		if err := serve(*addr); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
	}
	if count(*n, *interval, *lines && *n == 0, end) && (*addr != "" || *hold) {
		<-end
	}
	os.Exit(*code)
}

// count writes the lines and reports whether it wrote them all; false means
// that a signal came first.
func count(n int, interval time.Duration, endless bool, end <-chan os.Signal) bool {
	if n <= 0 && !endless {
		return true
	}
	tick := time.NewTicker(max(interval, time.Microsecond))
	defer tick.Stop()
	for i := 1; ; i++ {
		fmt.Printf("line %d\n", i)
		if i == n && !endless {
			return true
		}
		select {
		case <-tick.C:
		case <-end:
			return false
		}
	}
}

func banner() {
	host, _ := os.Hostname()
	fmt.Printf("Hello from %s: %s/%s, process %d, user %d, kernel %s\n",
		host, runtime.GOOS, runtime.GOARCH, os.Getpid(), os.Getuid(), kernel())
}

func kernel() string {
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

func serve(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	port := l.Addr().(*net.TCPAddr).Port
	for _, ip := range addresses() {
		fmt.Printf("serving http://%s\n", net.JoinHostPort(ip, fmt.Sprint(port)))
	}
	host, _ := os.Hostname()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "Hello %s, this is %s\n", r.RemoteAddr, host)
	})
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	go func() {
		fmt.Fprintln(os.Stderr, "demo:", http.Serve(l, nil))
		os.Exit(1)
	}()
	return nil
}

// addresses lists this machine's addresses that others can reach, or loopback
// when there are none.
func addresses() []string {
	var ips []string
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			ips = append(ips, n.IP.String())
		}
	}
	if ips == nil {
		ips = []string{"127.0.0.1"}
	}
	return ips
}

func get(url string) error {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	if _, err := io.Copy(out, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode >= 400 {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}
