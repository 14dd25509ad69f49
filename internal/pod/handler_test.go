package pod

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestChooseHandler(t *testing.T) {
	tests := []struct {
		annotation, handler, want string
		refused                   bool
	}{
		{"", "", "", false},
		{"", "vm", "vm", false},
		{"false", "runc", "runc", false},
		{"true", "", "untrusted", false},
		{"true", "untrusted", "untrusted", false},
		{"true", "runc", "", true},
	}
	for _, test := range tests {
		got, err := chooseHandler(map[string]string{untrustedAnnotation: test.annotation}, test.handler)
		if got != test.want || errdefs.IsInvalidArgument(err) != test.refused || !test.refused && err != nil {
			t.Errorf("annotation %q, handler %q: %q, %v", test.annotation, test.handler, got, err)
		}
	}
}
