package creds

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
	"sigs.k8s.io/yaml"
)

// Kubelet runs kubelet's credential provider plugins for the daemon: kubelet
// asks them for an image's registry only, and never for its mirrors.
type Kubelet struct {
	// Config is what kubelet takes as --image-credential-provider-config.
	Config string
	// Bin is what kubelet takes as --image-credential-provider-bin-dir.
	Bin string

	calls singleflight.Group
	mu    sync.Mutex
	cache map[string]cached
}

type cached struct {
	until time.Time
	auth  map[string]pluginAuth
}

type pluginAuth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// providerConfig is kubelet.config.k8s.io/v1 CredentialProviderConfig.
type providerConfig struct {
	APIVersion string           `json:"apiVersion"`
	Kind       string           `json:"kind"`
	Providers  []pluginProvider `json:"providers"`
}

type pluginProvider struct {
	Name                 string   `json:"name"`
	MatchImages          []string `json:"matchImages"`
	DefaultCacheDuration duration `json:"defaultCacheDuration"`
	APIVersion           string   `json:"apiVersion"`
	Args                 []string `json:"args"`
	Env                  []struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	} `json:"env"`
	TokenAttributes json.RawMessage `json:"tokenAttributes"`
}

type duration struct{ time.Duration }

func (d *duration) UnmarshalJSON(b []byte) error {
	var s string
	err := json.Unmarshal(b, &s)
	if err != nil || s == "" {
		return err
	}
	d.Duration, err = time.ParseDuration(s)
	return err
}

// pluginResponse is credentialprovider.kubelet.k8s.io CredentialProviderResponse.
type pluginResponse struct {
	Kind          string                `json:"kind"`
	CacheKeyType  string                `json:"cacheKeyType"`
	CacheDuration *duration             `json:"cacheDuration"`
	Auth          map[string]pluginAuth `json:"auth"`
}

// Find implements Source: the plugins whose matchImages fit, in their order.
func (k *Kubelet) Find(ctx context.Context, host, repository string) (Credential, bool, error) {
	providers, err := k.providers()
	if err != nil {
		return Credential{}, false, err
	}
	image := host + "/" + repository
	for _, p := range providers {
		if !slices.ContainsFunc(p.MatchImages, func(m string) bool { return matches(m, image) }) {
			continue
		}
		if len(p.TokenAttributes) > 0 {
			continue // needs a pod's service account token, which only kubelet has
		}
		auth, err := k.ask(ctx, p, host, image)
		if err != nil {
			return Credential{}, false, fmt.Errorf("credential provider %s for %s: %w", p.Name, host, err)
		}
		keys := make([]string, 0, len(auth))
		for key := range auth {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for _, key := range slices.Backward(keys) { // as kubelet does: the longer path first
			if matches(key, image) {
				return Credential{auth[key].Username, auth[key].Password}, true, nil
			}
		}
	}
	return Credential{}, false, nil
}

// providers reads the file, or all files of a folder, as kubelet does.
func (k *Kubelet) providers() ([]pluginProvider, error) {
	files := []string{k.Config}
	if fi, err := os.Stat(k.Config); err == nil && fi.IsDir() {
		files = nil
		for _, pattern := range []string{"*.json", "*.yaml", "*.yml"} {
			found, err := filepath.Glob(filepath.Join(k.Config, pattern))
			if err != nil {
				return nil, err
			}
			files = append(files, found...)
		}
		slices.Sort(files)
	}
	var out []pluginProvider
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("credential provider configuration: %w", err)
		}
		var c providerConfig
		if err := yaml.UnmarshalStrict(b, &c); err != nil {
			return nil, fmt.Errorf("credential provider configuration %s: %v: %w", file, err, errdefs.ErrFailedPrecondition)
		}
		if c.Kind != "CredentialProviderConfig" {
			return nil, fmt.Errorf("%s is of kind %q, want CredentialProviderConfig: %w", file, c.Kind, errdefs.ErrFailedPrecondition)
		}
		for _, p := range c.Providers {
			if p.Name == "" || p.Name != filepath.Base(p.Name) || p.Name == ".." {
				return nil, fmt.Errorf("%s: provider name %q is not that of a program in %s: %w", file, p.Name, k.Bin, errdefs.ErrFailedPrecondition)
			}
			out = append(out, p)
		}
	}
	return out, nil
}

// ask runs a plugin, or takes what it said before. Equal questions at the same
// time are one.
func (k *Kubelet) ask(ctx context.Context, p pluginProvider, host, image string) (map[string]pluginAuth, error) {
	for _, key := range []string{p.Name + " Image " + image, p.Name + " Registry " + host, p.Name + " Global"} {
		k.mu.Lock()
		c, ok := k.cache[key]
		k.mu.Unlock()
		if ok && time.Now().Before(c.until) {
			return c.auth, nil
		}
	}
	answers := k.calls.DoChan(p.Name+" "+image, func() (any, error) {
		// Not the caller's context: others wait for the answer too.
		return k.plugin(context.WithoutCancel(ctx), p, host, image)
	})
	select {
	case a := <-answers:
		auth, _ := a.Val.(map[string]pluginAuth)
		return auth, a.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (k *Kubelet) plugin(ctx context.Context, p pluginProvider, host, image string) (map[string]pluginAuth, error) {
	in, err := json.Marshal(map[string]string{"kind": "CredentialProviderRequest", "apiVersion": p.APIVersion, "image": image})
	if err != nil {
		return nil, err
	}
	env := make([]string, 0, len(p.Env))
	for _, e := range p.Env {
		env = append(env, e.Name+"="+e.Value)
	}
	out, _, err := run(ctx, filepath.Join(k.Bin, p.Name), p.Args, env, in)
	if err != nil {
		return nil, err
	}
	var r pluginResponse
	if json.Unmarshal(out, &r) != nil || r.Kind != "CredentialProviderResponse" { // the error would quote the answer
		return nil, fmt.Errorf("the answer is not a CredentialProviderResponse: %w", errdefs.ErrFailedPrecondition)
	}
	keep := p.DefaultCacheDuration.Duration
	if r.CacheDuration != nil {
		keep = r.CacheDuration.Duration
	}
	if keep <= 0 {
		return r.Auth, nil
	}
	key := p.Name + " Image " + image
	switch r.CacheKeyType {
	case "Registry":
		key = p.Name + " Registry " + host
	case "Global":
		key = p.Name + " Global"
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cache == nil || len(k.cache) > 1000 {
		k.cache = make(map[string]cached)
	}
	k.cache[key] = cached{time.Now().Add(keep), r.Auth}
	return r.Auth, nil
}

// matches is kubelet's rule: as many labels in the host, each a glob, the same
// port, and a path that begins alike.
func matches(pattern, image string) bool {
	if _, rest, ok := strings.Cut(pattern, "://"); ok {
		pattern = rest
	}
	patternHost, patternPath, _ := strings.Cut(pattern, "/")
	host, repository, _ := strings.Cut(image, "/")
	patternHost, patternPort := splitPort(patternHost)
	host, port := splitPort(host)
	if patternPort != port || !strings.HasPrefix(repository, patternPath) {
		return false
	}
	want, has := strings.Split(patternHost, "."), strings.Split(host, ".")
	if len(want) != len(has) {
		return false
	}
	for i := range want {
		if ok, err := path.Match(want[i], has[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

func splitPort(hostport string) (host, port string) {
	if h, p, err := net.SplitHostPort(hostport); err == nil {
		return h, p
	}
	return hostport, ""
}
