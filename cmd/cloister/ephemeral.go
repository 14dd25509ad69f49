package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"cloister.dev/internal/config"
)

// ephemeralTime bounds the clean-up after an ephemeral daemon.
const ephemeralTime = 15 * time.Second

// endEphemeral takes down what a daemon otherwise leaves for its successor:
// the shims in which nothing runs, and then the bridge of the built-in network
// when no pod is on it.
func endEphemeral(ctx context.Context, cfg config.Config) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ephemeralTime)
	defer cancel()
	program, err := shimProgram(cfg.Cloister.Shim)
	if err != nil {
		return err
	}
	states, err := filepath.Glob(filepath.Join(cfg.State, "shim", "*"))
	if err != nil {
		return fmt.Errorf("find the shims: %w", err)
	}
	for _, state := range states {
		out, err := exec.CommandContext(ctx, program, "stop", "--state", state).CombinedOutput()
		if err != nil {
			return fmt.Errorf("end the shim of %s: %w: %s", state, err, strings.TrimSpace(string(out)))
		}
	}
	if cfg.Cloister.Network != "builtin" {
		return nil
	}
	return removeIdleBridge(cfg.Cloister.BuiltinNetwork.Bridge)
}

func removeIdleBridge(name string) error {
	ports, err := os.ReadDir(filepath.Join("/sys/class/net", name, "brif"))
	if errors.Is(err, os.ErrNotExist) || len(ports) > 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the bridge %s: %w", name, err)
	}
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the bridge %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove the bridge %s: %w", name, err)
	}
	return nil
}
