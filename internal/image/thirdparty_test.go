package image

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Debian's docker-registry and skopeo: what other people's programs serve and
// make. test/setup installs them.

func needProgram(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed; run test/setup registry", name)
	}
	return path
}

// debianRegistry is a running docker-registry.
type debianRegistry struct {
	host string
	ca   string // file
	log  bytes.Buffer
}

// dockerOptions choose what the registry asks of its clients.
type dockerOptions struct {
	tls, auth bool
	mirrorOf  string // URL of another one
}

// serveDocker runs Debian's docker-registry until the test ends.
func serveDocker(t testing.TB, o dockerOptions) *debianRegistry {
	t.Helper()
	program := needProgram(t, "docker-registry")
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &debianRegistry{host: l.Addr().String()}
	l.Close()
	var c strings.Builder
	fmt.Fprintf(&c, "version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp:\n  addr: %s\n  secret: test\n", filepath.Join(dir, "data"), d.host)
	scheme := "http"
	if o.tls {
		scheme = "https"
		cert, key := certificate(t, dir, "server", "127.0.0.1")
		d.ca = cert
		fmt.Fprintf(&c, "  tls: {certificate: %s, key: %s}\n", cert, key)
	}
	if o.auth {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "htpasswd")
		writeFile(t, file, []byte("me:"+string(hash)+"\n"), 0o600)
		fmt.Fprintf(&c, "auth: {htpasswd: {realm: r, path: %s}}\n", file)
	}
	if o.mirrorOf != "" {
		fmt.Fprintf(&c, "proxy: {remoteurl: %s}\n", o.mirrorOf)
	}
	config := filepath.Join(dir, "config.yml")
	writeFile(t, config, []byte(c.String()), 0o600)
	cmd := exec.Command(program, "serve", config)
	cmd.Stdout, cmd.Stderr = &d.log, &d.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("docker-registry: %s", d.log.String())
		}
	})
	d.ready(t, scheme, ended)
	return d
}

func (d *debianRegistry) ready(t testing.TB, scheme string, ended <-chan struct{}) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: insecureTLS(), DisableKeepAlives: true}}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); ; {
		resp, err := client.Get(scheme + "://" + d.host + "/v2/")
		if err == nil {
			resp.Body.Close()
			return
		}
		select {
		case <-ended:
			t.Fatalf("docker-registry ended: %s", d.log.String())
		case <-deadline:
			t.Fatalf("docker-registry does not answer: %v", err)
		case <-tick.C:
		}
	}
}

// certificate makes a key and a certificate that it signed itself.
func certificate(t testing.TB, dir, name string, hosts ...string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, &c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	writeFile(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	writeFile(t, key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder}), 0o600)
	return cert, key
}

// rsaPair makes a private key, its public key and a certificate for it.
func rsaPair(t testing.TB, dir, name string) (private, public, cert string) {
	t.Helper()
	return rsaPairOf(t, 2048, dir, name)
}

func rsaPairOf(t testing.TB, bits int, dir, name string) (private, public, cert string) {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	pder, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	c := x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	cder, err := x509.CreateCertificate(rand.Reader, &c, &c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	private, public, cert = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".pub"), filepath.Join(dir, name+".crt")
	writeFile(t, private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder}), 0o600)
	writeFile(t, public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pder}), 0o644)
	writeFile(t, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cder}), 0o644)
	return private, public, cert
}

func writeFile(t testing.TB, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func skopeo(t testing.TB, args ...string) string {
	t.Helper()
	out, err := trySkopeo(t, args...)
	if err != nil {
		t.Fatalf("skopeo %v: %v: %s", args, err, out)
	}
	return out
}

func trySkopeo(t testing.TB, args ...string) (string, error) {
	t.Helper()
	program := needProgram(t, "skopeo")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"--insecure-policy"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	return string(out), err
}
