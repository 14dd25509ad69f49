package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// suite runs critest to its end and returns what it printed, which is shown
// as it comes. That specs failed is not an error here.
func suite(ctx context.Context, critest, endpoint string, skips, args []string) (string, error) {
	args = append([]string{
		"-runtime-endpoint", endpoint, "-ginkgo.no-color", "-ginkgo.skip", strings.Join(append([]string{impossible}, skips...), "|"),
	}, args...)
	cmd := exec.CommandContext(ctx, critest, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(os.Stdout, &out)
	cmd.Stderr = cmd.Stdout
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && ctx.Err() == nil {
		err = nil
	}
	return out.String(), err
}

var summary = regexp.MustCompile(`(\d+) Passed \| (\d+) Failed \|.* (\d+) Skipped`)

// judge prints the closing line and says whether the promise is kept; left are
// the specs that were left out by name. Of a partial run only failures count.
func judge(out string, left int, partial bool) error {
	m := summary.FindStringSubmatch(out)
	if m == nil {
		return errors.New("critest printed no summary")
	}
	n := make([]int, 3)
	for i := range n {
		var err error
		if n[i], err = strconv.Atoi(m[i+1]); err != nil {
			return err
		}
	}
	passed, failed := n[0], n[1]
	// The specs that are left out by name are not ones that this server could not run.
	skipped := n[2] - 1 - left
	wantPassed := wantPassed - left
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	switch {
	case failed > 0:
		return fmt.Errorf("%d specs failed", failed)
	case !partial && passed < wantPassed:
		return fmt.Errorf("only %d specs passed, %d must", passed, wantPassed)
	case !partial && skipped > maxSkipped:
		return fmt.Errorf("%d specs were skipped, at most %d may be", skipped, maxSkipped)
	case passed == 0:
		return errors.New("no spec ran")
	}
	return nil
}

func partial(args []string) bool {
	for _, a := range args {
		a = strings.TrimLeft(a, "-")
		for _, flag := range []string{"ginkgo.focus", "ginkgo.skip", "ginkgo.label-filter", "ginkgo.dry-run", "benchmark", "version", "help"} {
			if strings.HasPrefix(a, flag) {
				return true
			}
		}
	}
	return false
}
