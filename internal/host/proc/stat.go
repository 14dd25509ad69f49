// Package proc watches processes. It promises that the exit of every process
// it was asked to watch is told exactly once, with its true status wherever
// the kernel can still tell it, and that a durable record can be written
// before the kernel forgets the process: the exit is only peeked at
// (waitid with WNOWAIT), told, and the process reaped afterwards.
//
// Three kinds of process end here. Commands are children that are started and
// awaited by one call. Children are processes that a command left behind and
// that came to this process because it is a child subreaper. Strangers belong
// to somebody else (after this process was killed, its children went to the
// keeper or to init); they are watched through a pidfd.
//
// It knows nothing of containers, tasks or records.
package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Exit is how a process ended.
type Exit struct {
	Status  int       `json:"status"` // 128+n for signal n
	At      time.Time `json:"at"`
	Unknown bool      `json:"unknown,omitempty"` // nobody could tell; Status is 255
	Reason  string    `json:"reason,omitempty"`  // a sentence for people, where the status does not tell
}

// UnknownExit stands for an end whose status is lost.
func UnknownExit() Exit { return Exit{Status: 255, At: time.Now(), Unknown: true} }

// decodeStatus turns a wait status into the shell's convention.
func decodeStatus(w uint32) int {
	ws := unix.WaitStatus(w)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// Stat is what /proc/PID/stat tells of a process.
type Stat struct {
	State    byte // 'Z' for a process that ended and was not reaped
	PPid     int
	Start    uint64 // ticks after boot: with the pid, the process's identity
	waitCode uint32
}

// ReadStat reads /proc/PID/stat.
func ReadStat(pid int) (Stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Stat{}, err
	}
	return parseStat(b)
}

var errStat = errors.New("malformed stat line")

func parseStat(b []byte) (Stat, error) {
	// The command name is in parentheses and may hold anything, so fields are
	// counted after the last one.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return Stat{}, errStat
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return Stat{}, errStat
	}
	var s Stat
	var err error
	s.State = f[0][0]
	if s.PPid, err = strconv.Atoi(string(f[1])); err != nil {
		return Stat{}, fmt.Errorf("%w: ppid", errStat)
	}
	if s.Start, err = strconv.ParseUint(string(f[19]), 10, 64); err != nil {
		return Stat{}, fmt.Errorf("%w: start time", errStat)
	}
	if len(f) >= 50 {
		if c, err := strconv.ParseUint(string(f[49]), 10, 32); err == nil {
			s.waitCode = uint32(c)
		}
	}
	return s, nil
}
