package plugin

import (
	"context"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
)

type firewall struct{ *Set }

func (p firewall) add(context.Context, Call) (types.Result, error) {
	return nil, fmt.Errorf("firewall: %w", ErrNeedsProgram)
}
func (p firewall) del(context.Context, Call) error   { return fmt.Errorf("firewall: %w", ErrNeedsProgram) }
func (p firewall) check(context.Context, Call) error { return fmt.Errorf("firewall: %w", ErrNeedsProgram) }
