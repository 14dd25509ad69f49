package hosttest

import (
	"testing"

	hostv1 "cloister.dev/api/host/v1"
)

func TestRunc(t *testing.T) { Suite(t, OCI("runc")) }
func TestCrun(t *testing.T) { Suite(t, OCI("crun")) }
func TestVM(t *testing.T)   { Suite(t, VM(t)) }

func TestProbe(t *testing.T) {
	s := StartShim(t, OCI("runc"))
	for _, b := range []string{"runc", "crun", "nonesuch"} {
		r, err := s.Host.Probe(s.ctx(), &hostv1.ProbeRequest{Binary: b})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v", b, r)
		if r.Works != (b != "nonesuch") || !r.Works && r.Reason == "" || r.Works && (r.OciVersion == "" || r.Millis == 0) {
			t.Errorf("%s: %v", b, r)
		}
	}
}
