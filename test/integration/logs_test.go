package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (c *container) reopenLog() error {
	_, err := c.pod.n.Runtime.ReopenContainerLog(c.pod.t.Context(), &cri.ReopenContainerLogRequest{ContainerId: c.id})
	return err
}

// A log that is rotated under load, as kubelet does it, loses no line.
func TestRotationLosesNoLine(t *testing.T) {
	c := runPod(t, shared(t)).demo("-lines", "-n", "0", "-rate", "5000")
	const rotations = 20
	for i := range rotations {
		c.waitLog("line ")
		if err := os.Rename(c.logPath(), fmt.Sprintf("%s.%03d", c.logPath(), i)); err != nil {
			t.Fatal(err)
		}
		if err := c.reopenLog(); err != nil {
			t.Fatal(err)
		}
	}
	c.stop(10)
	c.ended()
	var all strings.Builder
	for i := range rotations + 1 {
		path := c.logPath()
		if i < rotations {
			path = fmt.Sprintf("%s.%03d", path, i)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) == 0 && i < rotations {
			t.Errorf("%s is empty", path)
		}
		all.Write(data)
	}
	if err := numbered(all.String(), 1); err != nil {
		t.Error(err)
	}
	wantError(t, c.reopenLog(), codes.FailedPrecondition, c.id[:13])
}

func TestLongAndUnfinishedLines(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.sh(`head -c 40000 /dev/zero | tr '\0' x; echo; printf 'no newline' >&2; printf '\033[31m\000\r'; echo`)
	c.ended()
	data, err := os.ReadFile(c.logPath())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			t.Fatalf("%q is no log line", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Error(err)
		}
		text := f[3]
		if strings.Trim(text, "x") == "" {
			text = fmt.Sprint(len(text), " x")
		}
		if f[1] == "stderr" {
			if text != "no newline" {
				t.Errorf("on stderr %q", text)
			}
			continue
		}
		got = append(got, f[2]+" "+text)
	}
	want := []string{"P 16384 x", "P 16384 x", "F 7232 x", "F \x1b[31m\x00\r"}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got %q, want %q", got, want)
	}
	if log := string(data); strings.Count(log, "no newline") != 1 {
		t.Errorf("the unfinished line is not there once: %q", log[max(0, len(log)-200):])
	}
}

func TestWithoutLogPath(t *testing.T) {
	n := shared(t)
	p := runPod(t, n)
	c := p.sh("i=0; while [ $i -lt 20000 ]; do echo 01234567890123456789; i=$((i+1)); done; exit 3", func(c *cri.ContainerConfig) { c.LogPath = "" })
	if st := c.ended(); st.ExitCode != 3 || st.LogPath != "" {
		t.Errorf("exit code %d, log path %q", st.ExitCode, st.LogPath)
	}
	if found := entries(p.cfg.LogDirectory); found != 0 {
		t.Errorf("%d files in the log folder", found)
	}
	bare := runPod(t, n, func(c *cri.PodSandboxConfig) { c.LogDirectory = "" })
	if st := bare.sh("echo x; exit 4", func(c *cri.ContainerConfig) { c.LogPath = "" }).ended(); st.ExitCode != 4 {
		t.Errorf("exit code %d, not 4", st.ExitCode)
	}
}

// Log files are for the node's administrator, and lie where kubelet looks.
func TestLogFileMode(t *testing.T) {
	c := runPod(t, shared(t)).sh("echo x", func(c *cri.ContainerConfig) { c.LogPath = "deep/er/0.log" })
	c.ended()
	st, err := os.Stat(filepath.Join(c.pod.cfg.LogDirectory, "deep/er/0.log"))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm()&0o007 != 0 {
		t.Errorf("mode %v", st.Mode())
	}
}
