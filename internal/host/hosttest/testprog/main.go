// Command testprog is what test containers run: each sub-command shows one
// behaviour of a process that a host has to cope with.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	arg := func(i int) string {
		if len(os.Args) > i {
			return os.Args[i]
		}
		return ""
	}
	num := func(i int) int { n, _ := strconv.Atoi(arg(i)); return n }
	switch arg(1) {
	case "exit": // STATUS [OUT [ERR]]
		fmt.Print(arg(3))
		fmt.Fprint(os.Stderr, arg(4))
		os.Exit(num(2))
	case "lines": // COUNT MICROSECONDS STATUS: numbered lines on both streams
		lines(num(2), time.Duration(num(3))*time.Microsecond)
		os.Exit(num(4))
	case "cat":
		n, _ := io.Copy(os.Stdout, os.Stdin)
		fmt.Fprintf(os.Stderr, "copied %d\n", n)
	case "sleep": // SECONDS
		time.Sleep(time.Duration(num(2)) * time.Second)
	case "trap": // STATUS: ends on SIGTERM
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGTERM)
		fmt.Println("ready")
		<-c
		os.Exit(num(2))
	case "oom":
		var keep [][]byte
		for range 1 << 12 {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			keep = append(keep, b)
		}
		fmt.Println(len(keep))
	case "tty":
		tty()
	case "spawn": // starts a child that holds the streams, and ends
		cmd := exec.Command("/prog", "sleep", "60")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("spawned")
	case "pid":
		fmt.Println(os.Getpid())
	default:
		os.Exit(64)
	}
}

func lines(n int, pause time.Duration) {
	for i := range n {
		// Of different lengths, so that a torn line cannot look whole.
		fmt.Fprintf(os.Stdout, "out %d %s.\n", i, strings.Repeat("x", i%97))
		fmt.Fprintf(os.Stderr, "err %d %s.\n", i, strings.Repeat("y", i%89))
		if pause > 0 {
			time.Sleep(pause)
		}
	}
}

func tty() {
	size := func() {
		w, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			fmt.Println("no terminal:", err)
			os.Exit(3)
		}
		fmt.Printf("size %dx%d\n", w.Col, w.Row)
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGWINCH)
	size()
	go func() {
		for range c {
			size()
		}
	}()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "quit" {
			os.Exit(5)
		}
		fmt.Println("got", in.Text())
	}
}
