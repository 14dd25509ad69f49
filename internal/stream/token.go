package stream

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// maxPending is how many prepared requests may wait for their client. kubelet
// follows a URL at once, so reaching it means a client that only prepares.
const maxPending = 1000

// tokens keeps prepared requests until their client comes, once, or their life
// is over.
type tokens struct {
	life time.Duration

	mu      sync.Mutex
	pending map[string]pending
}

type pending struct {
	request any // *ExecRequest, *AttachRequest or *PortForwardRequest
	expires time.Time
}

func newTokens(life time.Duration) *tokens {
	return &tokens{life: life, pending: map[string]pending{}}
}

// add keeps a request and gives the token that fetches it.
func (t *tokens) add(request any) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for token, p := range t.pending {
		if now.After(p.expires) {
			delete(t.pending, token)
		}
	}
	if len(t.pending) >= maxPending {
		return "", fmt.Errorf("%d streaming requests wait for their clients, try again in %s: %w",
			len(t.pending), t.life, errdefs.ErrResourceExhausted)
	}
	token := rand.Text()
	t.pending[token] = pending{request, now.Add(t.life)}
	return token, nil
}

// take gives the request of a token and forgets the token.
func (t *tokens) take(token string) (any, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.pending[token]
	delete(t.pending, token)
	if !ok || time.Now().After(p.expires) {
		return nil, false
	}
	return p.request, true
}
