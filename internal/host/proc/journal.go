package proc

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"time"
)

// Record is one line of an exit journal: who ended, and how.
type Record struct {
	Pid   int
	Start uint64
	Exit  Exit
}

// AppendRecord adds r to an exit journal that was opened with O_APPEND.
func AppendRecord(f *os.File, r Record) error {
	_, err := fmt.Fprintf(f, "%d %d %d %d\n", r.Pid, r.Start, r.Exit.Status, r.Exit.At.UnixNano())
	return err
}

// FindRecord looks for the end of a process in the exit journal at path; with
// start 0, for the last process of that pid. A journal that does not exist, or a torn last line, is no error: it holds
// nothing.
func FindRecord(path string, pid int, start uint64) (found Exit, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Exit{}, false
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		var r Record
		var ns int64
		if n, _ := fmt.Sscanf(sc.Text(), "%d %d %d %d", &r.Pid, &r.Start, &r.Exit.Status, &ns); n == 4 && r.Pid == pid && (start == 0 || r.Start == start) {
			found, ok = Exit{Status: r.Exit.Status, At: time.Unix(0, ns)}, true
		}
	}
	return found, ok
}
