package crypt

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/containers/ocicrypt/keywrap/keyprovider"
	keyproviderpb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	providerTime  = 30 * time.Second // ocicrypt's own client would wait for ever
	providerBytes = 1 << 20
)

// provider speaks the key provider protocol with one program or service.
// Private keys of the folder are not passed to it, as ocicrypt's would be.
type provider struct {
	name string
	keyproviderconfig.KeyProviderAttrs
}

func readProviders(file string) (map[string]provider, error) {
	if file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("key provider configuration: %w", err)
	}
	var c keyproviderconfig.OcicryptConfig
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("key provider configuration %s: %v: %w", file, err, errdefs.ErrFailedPrecondition)
	}
	out := make(map[string]provider, len(c.KeyProviderConfig))
	for name, attrs := range c.KeyProviderConfig {
		if (attrs.Command == nil || attrs.Command.Path == "") == (attrs.Grpc == "") {
			return nil, fmt.Errorf("key provider %q in %s needs either cmd.path or grpc: %w", name, file, errdefs.ErrFailedPrecondition)
		}
		out[name] = provider{name, attrs}
	}
	return out, nil
}

func (p provider) unwrap(ctx context.Context, wrapped []byte) ([]byte, error) {
	out, err := p.call(ctx, keyprovider.KeyProviderKeyWrapProtocolInput{
		Operation:       keyprovider.OpKeyUnwrap,
		KeyUnwrapParams: keyprovider.KeyUnwrapParams{Dc: &config.DecryptConfig{Parameters: map[string][][]byte{}}, Annotation: wrapped},
	})
	if err != nil {
		return nil, err
	}
	if len(out.KeyUnwrapResults.OptsData) == 0 {
		return nil, errors.New("the key provider gave no key")
	}
	return out.KeyUnwrapResults.OptsData, nil
}

func (p provider) wrap(ctx context.Context, parameters map[string][][]byte, key []byte) ([]byte, error) {
	out, err := p.call(ctx, keyprovider.KeyProviderKeyWrapProtocolInput{
		Operation:     keyprovider.OpKeyWrap,
		KeyWrapParams: keyprovider.KeyWrapParams{Ec: &config.EncryptConfig{Parameters: parameters}, OptsData: key},
	})
	if err != nil {
		return nil, err
	}
	if len(out.KeyWrapResults.Annotation) == 0 {
		return nil, errors.New("the key provider wrapped nothing")
	}
	return out.KeyWrapResults.Annotation, nil
}

func (p provider) call(ctx context.Context, in keyprovider.KeyProviderKeyWrapProtocolInput) (out keyprovider.KeyProviderKeyWrapProtocolOutput, err error) {
	ctx, cancel := context.WithTimeout(ctx, providerTime)
	defer cancel()
	b, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	if p.Command != nil {
		b, err = p.run(ctx, b)
	} else {
		b, err = p.ask(ctx, in.Operation, b)
	}
	if err != nil {
		return out, err
	}
	if json.Unmarshal(b, &out) != nil { // the error would quote what may be a key
		return out, errors.New("the answer of the key provider is not JSON of the key provider protocol")
	}
	return out, nil
}

func (p provider) run(ctx context.Context, in []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, p.Command.Path, p.Command.Args...)
	cmd.Stdin = bytes.NewReader(in)
	cmd.WaitDelay = time.Second
	var out, complaint limited
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer within %v: %w", providerTime, ctx.Err())
		}
		return nil, fmt.Errorf("key provider command %s: %w", p.Command.Path, err)
	}
	return out.Bytes(), nil
}

func (p provider) ask(ctx context.Context, op keyprovider.KeyProviderKeyWrapProtocolOperation, in []byte) ([]byte, error) {
	creds := insecure.NewCredentials()
	if p.GrpcTLS != nil {
		c, err := tlsConfig(*p.GrpcTLS)
		if err != nil {
			return nil, fmt.Errorf("key provider %s: %w", p.name, err)
		}
		creds = credentials.NewTLS(c)
	}
	cc, err := grpc.NewClient(p.Grpc, grpc.WithTransportCredentials(creds), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(providerBytes)))
	if err != nil {
		return nil, fmt.Errorf("key provider at %s: %w", p.Grpc, err)
	}
	defer cc.Close()
	client := keyproviderpb.NewKeyProviderServiceClient(cc)
	req := &keyproviderpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: in}
	call := client.UnWrapKey
	if op == keyprovider.OpKeyWrap {
		call = client.WrapKey
	}
	resp, err := call(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("key provider at %s: %w", p.Grpc, err)
	}
	return resp.GetKeyProviderKeyWrapProtocolOutput(), nil
}

func tlsConfig(t keyproviderconfig.GrpcTLS) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName, InsecureSkipVerify: t.InsecureSkipVerify} //nolint:gosec // the administrator's word
	if t.RootCAFile != "" {
		pem, err := os.ReadFile(t.RootCAFile)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", t.RootCAFile)
		}
	}
	if t.CertFile != "" || t.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// limited is a buffer that takes no more than an answer may have.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > providerBytes {
		return 0, io.ErrShortWrite
	}
	return l.Buffer.Write(p)
}
