package image

import (
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

const someDigest = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

func TestParseName(t *testing.T) {
	for in, want := range map[string]string{
		"busybox":                           "docker.io/library/busybox:latest",
		"busybox:1.36":                      "docker.io/library/busybox:1.36",
		"index.docker.io/library/busybox":   "docker.io/library/busybox:latest",
		"team/app":                          "docker.io/team/app:latest",
		"localhost/app":                     "localhost/app:latest",
		"localhost:5000/a/b:c":              "localhost:5000/a/b:c",
		"[::1]:5000/a:b":                    "[::1]:5000/a:b",
		"gcr.io/p/i@" + someDigest:          "gcr.io/p/i@" + someDigest,
		"gcr.io/p/i:tag@" + someDigest:      "gcr.io/p/i@" + someDigest,
		"registry.k8s.io/pause:3.9":         "registry.k8s.io/pause:3.9",
		"a.b/" + strings.Repeat("c", 250):   "a.b/" + strings.Repeat("c", 250) + ":latest",
		"a.b/c:" + strings.Repeat("d", 128): "a.b/c:" + strings.Repeat("d", 128),
	} {
		got, err := parseName(in)
		if err != nil || got.String() != want {
			t.Errorf("parseName(%q) = %v, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "a.b/UPPER", "a b", "a\nb", "../../etc", "/abs", "a//b", "a:b:c", "a@sha256:short", "a@md5:abc",
		"http://host/app", "a.b/" + strings.Repeat("c", 300), strings.Repeat("x", 10_000), "a:" + strings.Repeat("d", 129),
		strings.TrimPrefix(someDigest, "sha256:"), "a\x00b", "é/ü",
	} {
		if got, err := parseName(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("parseName(%.40q) = %v, %v; want InvalidArgument", in, got, err)
		} else if len(err.Error()) > 600 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("error for %.40q is unfit: %.700q", in, err)
		}
	}
	if _, err := parsePullName(someDigest); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pull of an ID: %v", err)
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "h:1/a@" + someDigest, "[::1]/a", strings.Repeat("a", 2000), "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseName(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		again, err := parseName(n.String())
		if err != nil || again.String() != n.String() {
			t.Fatalf("%q became %q, which became %v, %v", s, n, again, err)
		}
		if reference.IsNameOnly(n) {
			t.Fatalf("%q has neither tag nor digest", n)
		}
		if strings.Contains(reference.Domain(n), "/") || strings.Contains(n.String(), "..") && strings.Contains(n.Name(), "/../") {
			t.Fatalf("%q could leave a directory", n)
		}
	})
}

func TestParseUser(t *testing.T) {
	uid := func(n int64) *int64 { return &n }
	for in, want := range map[string]struct {
		uid  *int64
		name string
	}{
		"":                        {},
		":5":                      {},
		"0":                       {uid: uid(0)},
		"1002":                    {uid: uid(1002)},
		"1003:1004":               {uid: uid(1003)},
		"www-data":                {name: "www-data"},
		"www-data:1004":           {name: "www-data"},
		"2147483647":              {uid: uid(math.MaxInt32)},
		"2147483648":              {name: "2147483648"},
		"4294967295":              {name: "4294967295"},
		"4294967296":              {name: "4294967296"},
		"18446744073709551616":    {name: "18446744073709551616"},
		"99999999999999999999999": {name: "99999999999999999999999"},
		"-1":                      {name: "-1"},
		"+0":                      {name: "+0"},
		" 0":                      {name: " 0"},
		"0x0":                     {name: "0x0"},
		"٠":                       {name: "٠"},
	} {
		gotUID, gotName := parseUser(in)
		if gotName != want.name || (gotUID == nil) != (want.uid == nil) || gotUID != nil && *gotUID != *want.uid {
			t.Errorf("parseUser(%q) = %v, %q", in, gotUID, gotName)
		}
	}
}

func FuzzParseUser(f *testing.F) {
	for _, s := range []string{"0", "4294967296", "root:root", "-0", "0000000000000000000000", ":"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		uid, name := parseUser(s)
		if uid != nil && name != "" {
			t.Fatalf("%q is both %d and %q", s, *uid, name)
		}
		if uid == nil {
			return
		}
		user, _, _ := strings.Cut(s, ":")
		if *uid < 0 || *uid > math.MaxInt32 || *uid == 0 && strings.Trim(user, "0") != "" {
			t.Fatalf("%q became uid %d", s, *uid)
		}
	})
}

func FuzzDocuments(f *testing.F) {
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"`+someDigest+`","size":2},"layers":[]}`), true)
	f.Add([]byte(`{"manifests":[{},{"platform":{"os":"linux"}}]}`), false)
	f.Add([]byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["`+someDigest+`"]},"config":{"User":"1"}}`), true)
	f.Fuzz(func(t *testing.T, b []byte, manifest bool) {
		mt := "application/vnd.oci.image.index.v1+json"
		if manifest {
			mt = "application/vnd.oci.image.manifest.v1+json"
		}
		d, err := parseDocument(mt, b)
		if err == nil && manifest && d.checkImage() == nil {
			for _, l := range append(d.Layers, *d.Config) {
				if l.Size <= 0 || l.Digest.Validate() != nil {
					t.Fatalf("descriptor %+v passed", l)
				}
			}
		}
		if err == nil && !manifest {
			want, name, _ := platform("linux/amd64")
			_, _ = d.pick(want, name)
		}
		if c, err := parseConfig(b, 1); err == nil && len(c.RootFS.DiffIDs) != 1 {
			t.Fatalf("config %+v passed", c)
		}
	})
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"get https://h/p?X-Amz-Signature=abc&x=y: 403": "get https://h/p?… 403",
		"a\nb\tc\x1b[31m":               "a b c [31m",
		"see https://u:p@h/x?y=z#f now": "see https://h/x?… now",
	} {
		if got := clean(in); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
	if got := clean(strings.Repeat("é", 100_000)); len(got) > 3000 {
		t.Errorf("%d bytes", len(got))
	}
}
