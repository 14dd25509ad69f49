package nat

import (
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
)

func openIPTables(string, *slog.Logger) (Rules, error) {
	return nil, fmt.Errorf("iptables: %w", errdefs.ErrNotImplemented)
}
