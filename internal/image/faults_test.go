package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func isLayerGet(l v1.Layer) func(*http.Request) bool {
	h, _ := l.Digest()
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+h.String())
	}
}

func status(code int, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(w, body)
		}
		return true
	}
}

// TestFaults pulls from a registry that misbehaves: each pull must end soon,
// with a class, a sentence, and nothing left behind; and the next one, from the
// healed registry, must work.
func TestFaults(t *testing.T) {
	layer := fileLayer(t, "f", noise(t, 1<<20))
	good := imageOf(t, nil, fileLayer(t, "small", []byte("s")), layer)
	isBlob := isLayerGet(layer)
	on := func(match func(*http.Request) bool, do func(http.ResponseWriter, *http.Request)) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if match(r) {
				do(w, r)
				return true
			}
			return false
		}
	}
	isManifest := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
	rc, err := layer.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	wrong := bytes.Clone(body)
	wrong[len(wrong)/2] ^= 1

	for name, c := range map[string]struct {
		hook func(http.ResponseWriter, *http.Request) bool
		is   func(error) bool
		text string
	}{
		"not found":    {status(404, `{"errors":[{"code":"NAME_UNKNOWN"}]}`), errdefs.IsNotFound, ""},
		"forbidden":    {status(403, `{"errors":[{"code":"DENIED","message":"no entry"}]}`), errdefs.IsPermissionDenied, "no entry"},
		"unauthorised": {status(401, ``), errdefs.IsUnauthorized, "credentials"},
		"broken":       {status(500, `oops secret-in-body`), errdefs.IsUnavailable, ""},
		"rate limit": {on(isBlob, func(w http.ResponseWriter, r *http.Request) {
			status(429, `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`)(w, r)
		}), errdefs.IsResourceExhausted, "slow down"},
		"blob missing": {on(isBlob, func(w http.ResponseWriter, r *http.Request) { status(404, "")(w, r) }), errdefs.IsNotFound, ""},
		"lies about a layer": {on(isBlob, func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(wrong) }),
			errdefs.IsDataLoss, "other bytes"},
		"layer too long": {on(isBlob, func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(append(bytes.Clone(body), 'x')) }),
			errdefs.IsDataLoss, "other bytes"},
		"layer too short": {on(isBlob, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				_, _ = w.Write(body[:100])
			}
		}), errdefs.IsUnavailable, ""},
		"stalls": {on(isBlob, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			_, _ = w.Write(body[:4096])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}), isDeadline, "no byte moved"},
		"never answers": {on(isManifest, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }), isDeadline, "no byte moved"},
		"endless manifest": {on(isManifest, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			if r.Method == http.MethodHead {
				return
			}
			chunk := bytes.Repeat([]byte(" "), 1<<20)
			for r.Context().Err() == nil {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}), errdefs.IsResourceExhausted, "longer"},
		"redirects for ever": {on(isBlob, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) }),
			nil, "redirect"},
		"manifest of another digest": {on(func(r *http.Request) bool {
			return isManifest(r) && strings.HasPrefix(path.Base(r.URL.Path), "sha256:")
		},
			func(w http.ResponseWriter, r *http.Request) {
				raw, _ := good.RawManifest()
				w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
				_, _ = w.Write(bytes.Replace(raw, []byte("layers"), []byte("lAyers"), 1))
			}), errdefs.IsDataLoss, "other bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			ref := reg.push(t, "app", "1", good)
			s := openStore(t, func(o *Options) { o.ProgressTimeout = 500 * time.Millisecond })
			reg.fault(c.hook)
			start := time.Now()
			_, err := s.Pull(context.Background(), PullRequest{Ref: ref})
			if err == nil {
				t.Fatal("no error")
			}
			if c.is != nil && !c.is(err) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v", err)
			}
			if strings.Contains(err.Error(), "secret-in-body") || strings.ContainsAny(err.Error(), "\n\r") || !strings.Contains(err.Error(), ref) {
				t.Errorf("text %q", err)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
				t.Errorf("get after failure: %v", err)
			}
			t.Log(err)
			reg.fault(nil)
			mustPull(t, s, ref)
		})
	}
}

func isDeadline(err error) bool { return errors.Is(err, context.DeadlineExceeded) }

// TestHostileDocuments serves documents that are malformed or ambiguous.
func TestHostileDocuments(t *testing.T) {
	const (
		manifestType = "application/vnd.oci.image.manifest.v1+json"
		indexType    = "application/vnd.oci.image.index.v1+json"
		configType   = "application/vnd.oci.image.config.v1+json"
		layerType    = "application/vnd.oci.image.layer.v1.tar+gzip"
		schema1Type  = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	)
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", []byte("x"))
	good := imageOf(t, nil, layer)
	reg.push(t, "app", "good", good)
	lh, _ := layer.Digest()
	ls, _ := layer.Size()
	diffID, _ := layer.DiffID()
	config := func(text string) string {
		h, _, _ := v1.SHA256(strings.NewReader(text))
		reg.blob(t, "app", h.String(), []byte(text))
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, configType, h, len(text))
	}
	goodConfig := config(fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":[%q]}}`, nativeArch(), diffID))
	goodLayer := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, layerType, lh, ls)
	manifest := func(config, layers string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, manifestType, config, layers)
	}
	index := func(entries string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, indexType, entries)
	}
	entry := func(d string, size int, platform string) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d,"platform":%s}`, manifestType, d, size, platform)
	}
	for name, c := range map[string]struct {
		mediaType, body string
		is              func(error) bool
		text            string
	}{
		"schema 1":                {schema1Type, `{"schemaVersion":1}`, nil, "schema 1"},
		"schema 1 in disguise":    {manifestType, `{"fsLayers":[{}],"config":{}}`, errdefs.IsInvalidArgument, "schema 1"},
		"not JSON":                {manifestType, `hello`, errdefs.IsInvalidArgument, "JSON"},
		"layers and manifests":    {manifestType, `{"config":{},"layers":[],"manifests":[{}]}`, errdefs.IsInvalidArgument, "ambiguous"},
		"index with layers":       {indexType, `{"manifests":[],"layers":[{}]}`, errdefs.IsInvalidArgument, "ambiguous"},
		"claims another type":     {manifestType, fmt.Sprintf(`{"mediaType":%q,"config":{}}`, indexType), errdefs.IsInvalidArgument, "ambiguous"},
		"no config":               {manifestType, `{"layers":[]}`, errdefs.IsInvalidArgument, "configuration"},
		"artifact":                {manifestType, `{"artifactType":"application/x.sbom","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + someDigest + `","size":2},"layers":[]}`, errdefs.IsInvalidArgument, "application/x.sbom"},
		"unknown config":          {manifestType, manifest(`{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"`+someDigest+`","size":2}`, ""), errdefs.IsNotImplemented, "helm"},
		"config too large":        {manifestType, manifest(fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, configType, someDigest, maxDocument+1), ""), errdefs.IsResourceExhausted, "limit"},
		"config digest path":      {manifestType, manifest(fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:../../../etc/passwd","size":3}`, configType), ""), errdefs.IsInvalidArgument, "digest"},
		"negative layer":          {manifestType, manifest(goodConfig, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":-5}`, layerType, lh)), errdefs.IsInvalidArgument, "size"},
		"size wraps":              {manifestType, manifest(goodConfig, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":18446744073709551615}`, layerType, lh)), errdefs.IsInvalidArgument, ""},
		"encrypted layer":         {manifestType, manifest(goodConfig, fmt.Sprintf(`{"mediaType":"%s+encrypted","digest":%q,"size":%d}`, layerType, lh, ls)), errdefs.IsPermissionDenied, "encrypted"},
		"unknown layer":           {manifestType, manifest(goodConfig, fmt.Sprintf(`{"mediaType":"text/html","digest":%q,"size":%d}`, lh, ls)), errdefs.IsNotImplemented, "text/html"},
		"too many layers":         {manifestType, manifest(goodConfig, goodLayer+strings.Repeat(","+goodLayer, maxLayers)), errdefs.IsResourceExhausted, "limit"},
		"a million layers":        {manifestType, manifest(goodConfig, "{}"+strings.Repeat(",{}", 1_000_000)), errdefs.IsResourceExhausted, ""},
		"fewer diff IDs":          {manifestType, manifest(config(`{"os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`), goodLayer), errdefs.IsInvalidArgument, "layers"},
		"wrong diff ID":           {manifestType, manifest(config(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["`+someDigest+`"]}}`), goodLayer), nil, "diff id"},
		"diff ID path":            {manifestType, manifest(config(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["../../x"]}}`), goodLayer), errdefs.IsInvalidArgument, "digest"},
		"config not JSON":         {manifestType, manifest(config(`not json`), goodLayer), errdefs.IsInvalidArgument, "JSON"},
		"other architecture":      {manifestType, manifest(config(`{"os":"linux","architecture":"s390x","rootfs":{"type":"layers","diff_ids":["`+diffID.String()+`"]}}`), goodLayer), errdefs.IsNotFound, "s390x"},
		"no platform in index":    {indexType, index(entry(someDigest, 10, `{"os":"linux","architecture":"s390x"}`)), errdefs.IsNotFound, "s390x"},
		"empty index":             {indexType, index(""), errdefs.IsNotFound, "platform"},
		"index of missing":        {indexType, index(entry(someDigest, 10, `{"os":"linux","architecture":"`+nativeArch()+`"}`)), errdefs.IsNotFound, ""},
		"a million manifests":     {indexType, index("{}" + strings.Repeat(",{}", 1_000_000)), errdefs.IsResourceExhausted, ""},
		"manifest over the limit": {manifestType, manifest(goodConfig, goodLayer) + strings.Repeat(" ", maxDocument), errdefs.IsResourceExhausted, "limit"},
		"not an image at all":     {"text/html", `<html>login</html>`, errdefs.IsInvalidArgument, "text/html"},
	} {
		t.Run(name, func(t *testing.T) {
			tag := strings.ReplaceAll(name, " ", "-")
			h, _, _ := v1.SHA256(strings.NewReader(c.body))
			// The registry library refuses some of these: they are served by hand.
			reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
				base := path.Base(r.URL.Path)
				if !strings.Contains(r.URL.Path, "/manifests/") || base != tag && base != h.String() {
					return false
				}
				w.Header().Set("Content-Type", c.mediaType)
				w.Header().Set("Docker-Content-Digest", h.String())
				w.Header().Set("Content-Length", strconv.Itoa(len(c.body)))
				if r.Method == http.MethodGet {
					_, _ = io.WriteString(w, c.body)
				}
				return true
			})
			_, err := s.Pull(context.Background(), PullRequest{Ref: reg.host + "/app:" + tag})
			if err == nil {
				t.Fatal("no error")
			}
			if c.is != nil && !c.is(err) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v", err)
			}
			if len(err.Error()) > 3000 {
				t.Errorf("%d bytes of error", len(err.Error()))
			}
			t.Log(err)
		})
	}
	if n := len(s.List()); n != 0 {
		t.Errorf("%d images", n)
	}
}
