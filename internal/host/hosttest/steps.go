package hosttest

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

func itoa(n uint32) string { return strconv.Itoa(int(n)) }

func (s *Shim) kill(id string, sig syscall.Signal) {
	s.t.Helper()
	if _, err := s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: id, Signal: uint32(sig)}); err != nil {
		s.t.Fatalf("kill %s: %v", id, err)
	}
}

// awaitLog waits until a container's log holds text.
func (s *Shim) awaitLog(id, text string) {
	s.t.Helper()
	s.await("text "+text+" in the log of "+id, func() bool {
		b, _ := os.ReadFile(s.LogPath(id))
		return strings.Contains(string(b), text)
	})
}

// await polls for what no event tells.
func (s *Shim) await(what string, f func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(3 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("waited too long for %s", what)
		}
	}
}
