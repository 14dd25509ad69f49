package main

import (
	"log/slog"
	"path/filepath"
	"slices"
	"strings"

	"cloister.dev/internal/config"
	"cloister.dev/internal/image"
	"cloister.dev/internal/image/creds"
	"cloister.dev/internal/image/crypt"
)

// Where containerd's default configuration has the keys of encrypted images.
const (
	defaultKeys      = "/etc/containerd/ocicrypt/keys"
	defaultProviders = "/etc/containerd/ocicrypt/ocicrypt_keyprovider.conf"
)

func imageOptions(cfg config.Config, log *slog.Logger) image.Options {
	o := image.Options{
		Root: filepath.Join(cfg.Root, "images"), Snapshotter: cfg.Images.Snapshotter,
		Hosts:                  imageHosts(cfg, log),
		MaxConcurrentDownloads: cfg.Images.MaxConcurrentDownloads,
		LayerFetchBuffer:       cfg.Images.ConcurrentLayerFetchBuffer,
		ProgressTimeout:        cfg.Images.ImagePullProgressTimeout.Duration,
		DiscardUnpackedLayers:  cfg.Images.DiscardUnpackedLayers,
		SyncFS:                 cfg.Images.ImagePullWithSyncFS || cfg.Plugins.Differs.SyncFS, Log: log,
	}
	for _, ref := range cfg.Images.PinnedImages {
		o.Pinned = append(o.Pinned, ref)
	}
	for name, h := range cfg.Runtime.Containerd.Runtimes {
		o.Snapshotters = append(o.Snapshotters, snapshotter(cfg, name, h))
	}
	for _, p := range cfg.Images.RuntimePlatforms {
		o.Snapshotters = append(o.Snapshotters, p.Snapshotter)
	}
	slices.Sort(o.Snapshotters)
	for name, p := range cfg.ProxyPlugins {
		if p.Type != "snapshot" {
			continue
		}
		if o.ProxySnapshotters == nil {
			o.ProxySnapshotters = make(map[string]image.ProxySnapshotter)
		}
		o.ProxySnapshotters[name] = image.ProxySnapshotter{Address: p.Address, Root: p.Exports["root"],
			Remote: p.Exports["enable_remote_snapshot_annotations"] == "true" || !cfg.Images.DisableSnapshotAnnotations}
	}
	return o
}

// imageHosts is what of the images' configuration can change while the daemon runs.
func imageHosts(cfg config.Config, log *slog.Logger) image.Hosts {
	r := cfg.Images.Registry
	h := image.Hosts{ConfigPath: r.ConfigPath, Headers: r.Headers, Credentials: credentialSources(cfg), Decryption: decryption(cfg, log)}
	for host, m := range r.Mirrors {
		if h.Registries.Mirrors == nil {
			h.Registries.Mirrors = make(map[string][]string)
		}
		h.Registries.Mirrors[host] = m.Endpoints
	}
	for host, c := range r.Configs {
		if c.TLS == (config.RegistryTLS{}) {
			continue
		}
		if h.Registries.TLS == nil {
			h.Registries.TLS = make(map[string]image.RegistryTLS)
		}
		h.Registries.TLS[host] = image.RegistryTLS{SkipVerify: c.TLS.InsecureSkipVerify, CA: c.TLS.CAFile, Cert: c.TLS.CertFile, Key: c.TLS.KeyFile}
	}
	return h
}

// credentialSources asks the configuration first, then Docker's files, then
// kubelet's plugins.
func credentialSources(cfg config.Config) creds.Source {
	static := make(creds.Static)
	add := func(host string, a config.RegistryAuth) {
		if a != (config.RegistryAuth{}) {
			static[host] = creds.Auth{Username: a.Username, Password: a.Password.Reveal(), Auth: a.Auth.Reveal(), IdentityToken: a.IdentityToken.Reveal()}
		}
	}
	for host, a := range cfg.Images.Registry.Auths {
		add(host, a)
	}
	for host, c := range cfg.Images.Registry.Configs {
		add(host, c.Auth)
	}
	sources := creds.Sources{static}
	c := cfg.Cloister.Credentials
	for _, file := range c.DockerConfigs {
		sources = append(sources, creds.Docker(file))
	}
	if c.ProviderConfig != "" {
		sources = append(sources, &creds.Kubelet{Config: c.ProviderConfig, Bin: c.ProviderBinDir})
	}
	return sources
}

// decryption takes the keys of containerd's decoder program out of its
// arguments: nothing is started for them.
func decryption(cfg config.Config, log *slog.Logger) []image.Decryption {
	if cfg.Images.ImageDecryption.KeyModel != "node" {
		return nil
	}
	var out []image.Decryption
	for name, p := range cfg.StreamProcessors {
		if filepath.Base(p.Path) != "ctd-decoder" {
			log.Warn("stream processor is not used: only ctd-decoder's work is done here", "processor", name, "path", p.Path)
			continue
		}
		d := image.Decryption{Accepts: p.Accepts}
		for i, a := range p.Args {
			if v, ok := strings.CutPrefix(a, "--decryption-keys-path="); ok {
				d.Keys.Folder = v
			} else if a == "--decryption-keys-path" && i+1 < len(p.Args) {
				d.Keys.Folder = p.Args[i+1]
			}
		}
		for _, e := range p.Env {
			if v, ok := strings.CutPrefix(e, "OCICRYPT_KEYPROVIDER_CONFIG="); ok {
				d.Keys.Providers = v
			}
		}
		out = append(out, d)
	}
	// Other types, such as zstd, which containerd has no processor for.
	return append(out, image.Decryption{Keys: crypt.Keys{Folder: defaultKeys, Providers: defaultProviders}})
}
