package creds

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

const maxAnswer = 1 << 20

// run gives a program its input and returns what it wrote. The complaint goes
// into no error: it may hold a secret.
func run(ctx context.Context, program string, args, env []string, in []byte) (out []byte, complaint string, err error) {
	ctx, cancel := context.WithTimeout(ctx, programTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = bytes.NewReader(in)
	cmd.WaitDelay = time.Second
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer in time: %w", ctx.Err())
		}
		return nil, stdout.String() + stderr.String(), err
	}
	return stdout.Bytes(), "", nil
}

// limited is a buffer that takes no more than an answer may have.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxAnswer {
		return 0, io.ErrShortWrite
	}
	return l.Buffer.Write(p)
}
