package image

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"

	"cloister.dev/internal/image/creds"
)

// session is one pull's view of the registries: the hosts that the
// configuration gives for the image, credentials for exactly those, and the
// meter that watches all traffic.
type session struct {
	meter      *meter
	secret     credentials
	node       creds.Source
	configPath string
	headers    http.Header
	registry   string // of the image's name
	repository string

	// A layer larger than a chunk is fetched by so many requests at a time.
	chunk, parallel int

	mu         sync.Mutex
	hosts      map[string]bool // host[:port] of the configuration
	transports []*guard
}

func (s *Store) newSession(name reference.Named, auth *Auth) (*session, error) {
	hosts := s.hosts.Load()
	c, err := callersCredentials(auth)
	if err != nil {
		return nil, err
	}
	return &session{
		meter:      newMeter(),
		configPath: hosts.ConfigPath,
		secret:     c,
		node:       hosts.Credentials,
		headers:    http.Header(maps.Clone(hosts.Headers)),
		registry:   reference.Domain(name),
		repository: reference.Path(name),
		chunk:      s.o.LayerFetchBuffer,
		parallel:   s.o.MaxConcurrentDownloads,
		hosts:      make(map[string]bool),
	}, nil
}

// resolver speaks to the hosts that the trees of hosts.toml name.
func (ss *session) resolver(ctx context.Context) remotes.Resolver {
	options := dockerconfig.HostOptions{
		HostDir:      hostDirs(ss.configPath),
		Credentials:  func(host string) (string, string, error) { return ss.credentialsFor(ctx, host) },
		UpdateClient: ss.guardClient,
	}
	return docker.NewResolver(docker.ResolverOptions{
		Headers: ss.headers,
		Hosts: func(name string) ([]docker.RegistryHost, error) {
			var c complaint
			list, err := dockerconfig.ConfigureHosts(c.within(ctx), options)(name)
			if err = cmp.Or(err, c.err); err != nil {
				return nil, fmt.Errorf("registry configuration for %s below %s: %w: %w", quoted(name), ss.configPath, err, errdefs.ErrFailedPrecondition)
			}
			ss.mu.Lock()
			defer ss.mu.Unlock()
			for i, h := range list {
				ss.hosts[h.Host] = true
				if ss.secret.registryToken != "" && !ss.mirror(h.Host) {
					list[i].Authorizer = bearer{ss}
				}
			}
			return list, nil
		},
	})
}

// fetchers fetch blobs of a repository at once, and large ones in parts. parts
// is nil when that is not asked for.
func (ss *session) fetchers(ctx context.Context, r remotes.Resolver, ref string) (whole, parts remotes.Fetcher, err error) {
	if whole, err = r.Fetcher(ctx, ref); err != nil || ss.chunk <= 0 {
		return whole, nil, err
	}
	o, ok := r.(interface {
		SetOptions(...transfer.ImageResolverOption)
	})
	if !ok {
		return whole, nil, nil
	}
	o.SetOptions(transfer.WithConcurrentLayerFetchBuffer(ss.chunk), transfer.WithMaxConcurrentDownloads(ss.parallel))
	parts, err = r.Fetcher(ctx, ref)
	return whole, parts, err
}

// complaint catches what containerd's reader of hosts.toml only logs: it goes
// on as if a damaged file were not there, past the mirrors that it names.
type complaint struct{ err error }

func (c *complaint) within(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.AddHook(c)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// Levels and Fire make it a hook of a logger.
func (*complaint) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (c *complaint) Fire(e *logrus.Entry) error {
	err, ok := e.Data[logrus.ErrorKey].(error)
	if !ok {
		err = errors.New("unknown fault")
	}
	c.err = cmp.Or(c.err, fmt.Errorf("%s: %w", e.Message, err))
	return nil
}

// hostDirs looks through the trees in their order; the first that knows the
// host, or has a _default, wins.
func hostDirs(configPath string) func(string) (string, error) {
	roots := filepath.SplitList(configPath)
	return func(host string) (string, error) {
		for _, root := range roots {
			if root == "" {
				continue
			}
			dir, err := dockerconfig.HostDirFromRoot(root)(host)
			if errdefs.IsNotFound(err) {
				continue
			}
			return dir, err
		}
		return "", errdefs.ErrNotFound
	}
}

// guardClient puts the meter and the guard around a client's transport. It is
// called again for copies of a client that has them already.
func (ss *session) guardClient(c *http.Client) error {
	if _, ok := c.Transport.(*guard); ok {
		return nil
	}
	g := &guard{next: c.Transport, session: ss}
	c.Transport = g
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.transports = append(ss.transports, g)
	return nil
}

// close drops the connections that the pull kept open.
func (ss *session) close() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, g := range ss.transports {
		if c, ok := g.next.(interface{ CloseIdleConnections() }); ok {
			c.CloseIdleConnections()
		}
	}
}

// mirror says whether a host stands in for the registry of the image's name.
func (ss *session) mirror(host string) bool { return creds.Hub(host) != creds.Hub(ss.registry) }

func (ss *session) configured(host string) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.hosts[host]
}

// credentialsFor answers a registry's challenge. A host that is not in the
// configuration, reached by a redirect, gets nothing. The registry gets the
// caller's credentials before the node's own; a mirror gets the node's own for
// it first, which the caller cannot know.
func (ss *session) credentialsFor(ctx context.Context, host string) (user, secret string, err error) {
	if !ss.configured(host) {
		return "", "", nil
	}
	if user, secret, _ = ss.secret.lookup(host); secret != "" && !ss.mirror(host) {
		return user, secret, nil
	}
	if ss.node == nil {
		return user, secret, nil
	}
	c, ok, err := ss.node.Find(ctx, host, ss.repository)
	switch {
	case ok:
		ss.learn(c.Secret)
		return c.User, c.Secret, nil
	case secret != "":
		return user, secret, nil
	}
	return "", "", err
}

// learn remembers a secret, for cutting it out of errors.
func (ss *session) learn(secret string) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.secret.secrets = append(ss.secret.secrets, secret, base64.StdEncoding.EncodeToString([]byte(secret)))
}

func (ss *session) secrets() []string {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return slices.Clone(ss.secret.secrets)
}

// credentials are what the caller of a pull lets a registry see.
type credentials struct {
	lookup        func(host string) (user, secret string, err error)
	registryToken string
	secrets       []string // for cutting them out of errors
}

func callersCredentials(a *Auth) (credentials, error) {
	none := func(string) (string, string, error) { return "", "", nil }
	if a == nil || *a == (Auth{}) || *a == (Auth{ServerAddress: a.ServerAddress}) {
		return credentials{lookup: none}, nil
	}
	user, secret := a.Username, a.Password
	switch {
	case user != "":
	case a.IdentityToken != "":
		secret = a.IdentityToken
	case a.Auth != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return credentials{}, fmt.Errorf("credentials: field auth is not base64: %w", errdefs.ErrInvalidArgument)
		}
		var ok bool
		user, secret, ok = strings.Cut(string(b), ":")
		if !ok {
			return credentials{}, fmt.Errorf("credentials: field auth is not of the form user:password: %w", errdefs.ErrInvalidArgument)
		}
		secret = strings.Trim(secret, "\x00")
	case a.RegistryToken != "":
	default:
		return credentials{}, fmt.Errorf("credentials without user, token or auth: %w", errdefs.ErrInvalidArgument)
	}
	c := credentials{secrets: []string{a.Password, a.Auth, a.IdentityToken, a.RegistryToken, secret}}
	if user == "" && secret == "" {
		c.registryToken = a.RegistryToken
	}
	c.lookup = func(host string) (string, string, error) {
		if !serves(a.ServerAddress, host) {
			return "", "", nil
		}
		return user, secret, nil
	}
	return c, nil
}

// serves says whether credentials made for an address are meant for host. The
// address may be a URL; Docker Hub has three names.
func serves(address, host string) bool {
	if address == "" {
		return true
	}
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		return false
	}
	return creds.Hub(u.Host) == creds.Hub(host)
}

// bearer shows a ready-made registry token to configured hosts.
type bearer struct{ ss *session }

func (b bearer) Authorize(_ context.Context, r *http.Request) error {
	if b.ss.configured(r.URL.Host) {
		r.Header.Set("Authorization", "Bearer "+b.ss.secret.registryToken)
	}
	return nil
}

func (bearer) AddResponses(context.Context, []*http.Response) error {
	return fmt.Errorf("%w: the registry refuses the registry token", docker.ErrInvalidAuthorization)
}

// pullRef is the form of a name that containerd's resolver takes.
func pullRef(n reference.Named) string { return n.String() }
