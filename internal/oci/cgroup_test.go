package oci

import (
	"path"
	"testing"
)

func TestParentCgroup(t *testing.T) {
	for parent, want := range map[string]string{
		"/kubepods/burstable/pod1":            "/kubepods/burstable/pod1",
		"k8s.io":                              "/k8s.io",
		"../../etc":                           "/etc",
		"kubepods-burstable-pod1_2.slice":     "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
		"/kubepods.slice/kubepods-podx.slice": "/kubepods.slice/kubepods-podx.slice",
		"system.slice":                        "/system.slice",
		"-.slice":                             "/",
	} {
		if got := ParentCgroup(parent); got != want {
			t.Errorf("%s is at %s, want %s", parent, got, want)
		}
	}
}

func TestContainerCgroup(t *testing.T) {
	for _, tt := range []struct {
		parent           string
		systemd          bool
		inSpec, inKernel string
	}{
		{"", false, "/cloister/c1", "/cloister/c1"},
		{"/kubepods/podx", false, "/kubepods/podx/c1", "/kubepods/podx/c1"},
		{"../../etc", false, "/etc/c1", "/etc/c1"},
		{"", true, "system.slice:cloister:c1", "/system.slice/cloister-c1.scope"},
		{"/kubepods.slice/kubepods-podx.slice", true, "kubepods-podx.slice:cloister:c1", "/kubepods.slice/kubepods-podx.slice/cloister-c1.scope"},
	} {
		if got := cgroupsPath(tt.parent, "c1", tt.systemd); got != tt.inSpec {
			t.Errorf("under %q the specification says %s, want %s", tt.parent, got, tt.inSpec)
		}
		got := ContainerCgroup(tt.parent, "c1", tt.systemd)
		if got != tt.inKernel {
			t.Errorf("under %q it is at %s, want %s", tt.parent, got, tt.inKernel)
		}
		if id := ContainerOf(path.Base(got)); id != "c1" {
			t.Errorf("%s is of %s", got, id)
		}
	}
}
