package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"cloister.dev/internal/network/nat"
)

// passAge is how often the node's filter is looked at again: other software
// may begin to drop what is forwarded at any time.
const passAge = 10 * time.Second

// passage keeps the subnets passing where the node drops what it forwards.
type passage struct {
	forward *nat.Forward

	mu      sync.Mutex
	when    time.Time
	granted []string // who to revoke
}

func (p *passage) ensure(a *Attacher) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.when) < passAge {
		return nil
	}
	ctx, owner := context.Background(), "cloister "+a.o.Bridge
	for _, s := range a.o.Subnets {
		if !p.forward.Filtered(s.Addr().Is4()) {
			continue
		}
		who, subnet := fmt.Sprintf("%s %s", owner, s), []netip.Prefix{s}
		ok, err := p.forward.Allowed(ctx, who, subnet)
		if !slices.Contains(p.granted, who) {
			p.granted = append(p.granted, who)
		}
		if err == nil && !ok {
			a.log.Info("the node drops what it forwards, letting pods pass", "subnet", s)
			err = p.forward.Allow(ctx, who, subnet, nat.AdminChain)
		}
		if err != nil {
			return fmt.Errorf("builtin network: %w", err)
		}
	}
	p.when = time.Now()
	return nil
}

// revoke takes the passage back.
func (p *passage) revoke(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, who := range p.granted {
		errs = append(errs, p.forward.Revoke(ctx, who))
	}
	p.granted, p.when = nil, time.Time{}
	return errors.Join(errs...)
}
