package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test program plays programs that a node calls, a CNI plugin and an OCI
// runtime, which behave as a file tells them.
const (
	roleVariable    = "INTEGRATION_ROLE"
	controlVariable = "INTEGRATION_CONTROL"
)

// stage is a folder with such programs. What they do is told by mode.
type stage struct {
	t   *testing.T
	dir string
}

func newStage(t *testing.T) stage {
	t.Helper()
	s := stage{t, t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"gate", "oci"} {
		script := fmt.Sprintf("#!/bin/sh\n%s=%s %s=%s exec %s \"$@\"\n", roleVariable, program, controlVariable, s.dir, self)
		if err := os.WriteFile(filepath.Join(s.dir, program), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.mode("pass")
	t.Cleanup(func() { s.mode("pass") })
	return s
}

// mode says what the programs do from now on; those that hold look again.
func (s stage) mode(m string) {
	if err := replace(filepath.Join(s.dir, "mode"), m); err != nil {
		s.t.Error(err)
	}
}

// calls are the commands that were given to the programs.
func (s stage) calls() []string {
	data, err := os.ReadFile(filepath.Join(s.dir, "calls"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(data))
}

func (s stage) called(command string) int {
	count := 0
	for _, c := range s.calls() {
		if c == command {
			count++
		}
	}
	return count
}

// replace writes a file that others may be reading.
func replace(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// play is the program's main function in a role.
func play(role string) int {
	dir := os.Getenv(controlVariable)
	command := os.Getenv("CNI_COMMAND")
	if role == "oci" {
		command = ociCommand(os.Args[1:])
	}
	f, err := os.OpenFile(filepath.Join(dir, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 1
	}
	fmt.Fprintln(f, command)
	f.Close()
	creating := command == "ADD" || command == "create" || command == "run"
	for creating || command == "DEL" || command == "delete" {
		mode, err := os.ReadFile(filepath.Join(dir, "mode"))
		if err != nil {
			return 1
		}
		switch m := string(mode); {
		case m == "hang" && command != "delete", m == "hold" && creating, m == "hold-del" && command == "DEL":
			time.Sleep(5 * time.Millisecond)
			continue
		case m == "rubbish" && creating:
			os.Stdout.WriteString(strings.Repeat("\x00\x1b[31mrubbish\n{]", 2000))
			os.Stderr.WriteString(strings.Repeat("\x00\x1b[31mrubbish\n{]", 2000))
			if role == "oci" {
				return 1
			}
			return 0
		case m == "fail" && creating, m == "fail-del" && (command == "DEL" || command == "delete"):
			fmt.Println(`{"cniVersion":"1.0.0","code":100,"msg":"no more widgets","details":"widget pool is empty"}`)
			return 1
		case m == "crash" && creating:
			syscall.Kill(os.Getpid(), syscall.SIGSEGV)
			time.Sleep(time.Minute) // until the signal comes
		}
		break
	}
	if role == "oci" {
		return passOn()
	}
	return answer(command)
}

func ociCommand(args []string) string {
	for _, a := range args {
		switch a {
		case "create", "run", "start", "state", "kill", "delete", "exec", "update", "features", "ps":
			return a
		}
	}
	return strings.Join(args, "_")
}

// passOn becomes the real runtime.
func passOn() int {
	var real string
	for _, p := range []string{"/usr/local/sbin/runc", "/usr/sbin/runc", "/usr/bin/runc"} {
		if _, err := os.Stat(p); err == nil {
			real = p
			break
		}
	}
	err := syscall.Exec(real, append([]string{"runc"}, os.Args[1:]...), os.Environ())
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// answer is what a plugin says that adds nothing to the one before it.
func answer(command string) int {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return 1
	}
	switch command {
	case "ADD":
		var conf struct {
			PrevResult json.RawMessage `json:"prevResult"`
		}
		if json.Unmarshal(in, &conf) != nil {
			return 1
		}
		os.Stdout.Write(conf.PrevResult)
	case "VERSION":
		fmt.Println(`{"cniVersion":"1.0.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0"]}`)
	}
	return 0
}
