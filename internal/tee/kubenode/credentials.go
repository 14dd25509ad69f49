package kubenode

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"
)

// InCluster stands for a kubeconfig: the credentials of the pod that we run in.
const InCluster = "in-cluster"

// serviceAccount is where a pod finds its credentials.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// kubeconfig is what of such a file a node or a pod has: a server, and a
// certificate or a token. Programs that fetch tokens are for people.
type kubeconfig struct {
	CurrentContext string `json:"current-context"`
	Contexts       []struct {
		Name    string
		Context struct{ Cluster, User string }
	}
	Clusters []struct {
		Name    string
		Cluster cluster
	}
	Users []struct {
		Name string
		User user
	}
}

type cluster struct {
	Server     string
	CA         string `json:"certificate-authority"`
	CAData     []byte `json:"certificate-authority-data"`
	Insecure   bool   `json:"insecure-skip-tls-verify"`
	ServerName string `json:"tls-server-name"`
}

type user struct {
	Certificate     string `json:"client-certificate"`
	CertificateData []byte `json:"client-certificate-data"`
	Key             string `json:"client-key"`
	KeyData         []byte `json:"client-key-data"`
	Token           string
	TokenFile       string
	Exec            map[string]any
	AuthProvider    map[string]any `json:"auth-provider"`
}

// maxFile bounds a kubeconfig and what it names.
const maxFile = 1 << 20

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes: %w", path, maxFile, errdefs.ErrInvalidArgument)
	}
	return os.ReadFile(path)
}

// credentials finds the server and who we are to it.
func credentials(path string) (cluster, user, error) {
	if path == InCluster {
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" || port == "" {
			return cluster{}, user{}, fmt.Errorf("this is not a pod of a cluster, KUBERNETES_SERVICE_HOST is not set: %w", errdefs.ErrFailedPrecondition)
		}
		return cluster{Server: "https://" + net.JoinHostPort(host, port), CA: filepath.Join(serviceAccount, "ca.crt")},
			user{TokenFile: filepath.Join(serviceAccount, "token")}, nil
	}
	b, err := readFile(path)
	if err != nil {
		return cluster{}, user{}, err
	}
	var k kubeconfig
	if err := yaml.Unmarshal(b, &k); err != nil {
		// What the parser says may quote a key or a token.
		return cluster{}, user{}, fmt.Errorf("it is not YAML of a kubeconfig: %w", errdefs.ErrInvalidArgument)
	}
	return k.current(filepath.Dir(path))
}

// current picks the current context; relative paths start at the file's folder.
func (k kubeconfig) current(dir string) (c cluster, u user, err error) {
	bad := func(what string) error {
		return fmt.Errorf("%s: %w", what, errdefs.ErrInvalidArgument)
	}
	names := struct{ Cluster, User string }{}
	for _, x := range k.Contexts {
		if x.Name == k.CurrentContext {
			names = x.Context
		}
	}
	found := 0
	for _, x := range k.Clusters {
		if x.Name == names.Cluster {
			c = x.Cluster
			found++
		}
	}
	for _, x := range k.Users {
		if x.Name == names.User {
			u = x.User
			found++
		}
	}
	switch {
	case found != 2:
		return c, u, bad(fmt.Sprintf("its current context %q has no cluster or no user", k.CurrentContext))
	case c.Insecure:
		return c, u, bad("it does not verify the server (insecure-skip-tls-verify); name its certificate-authority")
	case u.Exec != nil || u.AuthProvider != nil:
		return c, u, bad("its user is a program (exec, auth-provider), which is not supported; use one with a certificate or a token")
	}
	for _, p := range []*string{&c.CA, &u.Certificate, &u.Key, &u.TokenFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	return c, u, nil
}

// transport makes the connections. Certificates and tokens are read anew for
// each, because they are rotated.
func transport(c cluster, u user) (http.RoundTripper, *url.URL, error) {
	base, err := url.Parse(c.Server)
	if err != nil || base.Scheme != "https" || base.Host == "" {
		return nil, nil, fmt.Errorf("server %q is not https://HOST: %w", c.Server, errdefs.ErrInvalidArgument)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName}
	ca := c.CAData
	if len(ca) == 0 && c.CA != "" {
		if ca, err = readFile(c.CA); err != nil {
			return nil, nil, fmt.Errorf("certificate-authority: %w", err)
		}
	}
	if len(ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, nil, fmt.Errorf("certificate-authority has no certificate: %w", errdefs.ErrInvalidArgument)
		}
	}
	if u.Certificate != "" || len(u.CertificateData) > 0 {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return u.pair() }
		if _, err := u.pair(); err != nil {
			return nil, nil, fmt.Errorf("client-certificate: %w", err)
		}
	}
	t := &http.Transport{TLSClientConfig: config, IdleConnTimeout: 90 * time.Second, TLSHandshakeTimeout: 10 * time.Second, Proxy: http.ProxyFromEnvironment}
	return &bearer{t, u}, base, nil
}

func (u user) pair() (*tls.Certificate, error) {
	cert, key := u.CertificateData, u.KeyData
	var err error
	if len(cert) == 0 {
		cert, err = readFile(u.Certificate)
	}
	if len(key) == 0 && err == nil {
		key, err = readFile(cmp.Or(u.Key, u.Certificate))
	}
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	return &pair, err
}

// bearer adds the token to requests.
type bearer struct {
	*http.Transport
	u user
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	token := b.u.Token
	if b.u.TokenFile != "" {
		text, err := readFile(b.u.TokenFile)
		if err != nil {
			return nil, errors.Join(errdefs.ErrPermissionDenied, fmt.Errorf("read the token: %w", err))
		}
		token = strings.TrimSpace(string(text))
	}
	if token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return b.Transport.RoundTrip(r)
}
