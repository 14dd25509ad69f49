package oci

import (
	"errors"

	"github.com/containerd/containerd/v2/pkg/blockio"
	"github.com/intel/goresctrl/pkg/kubernetes"
	"github.com/intel/goresctrl/pkg/rdt"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Classes turn the names that annotations give into limits of the node. A nil
// function means that the node has no such classes.
type Classes struct {
	// BlockIO gives the limits and weights of a blockio class.
	BlockIO func(class string) (*specs.LinuxBlockIO, error) `json:"-"`
	// RDT tells whether a container may have the class of cache and memory
	// bandwidth that annotations of it, or of its pod, name.
	RDT func(container string, annotations, podAnnotations map[string]string) error `json:"-"`
	// IgnoreNoBlockIO and IgnoreNoRDT run a container without its class where
	// the node has none, instead of refusing it.
	IgnoreNoBlockIO, IgnoreNoRDT bool
}

// setClasses gives the container the classes that annotations of it or of its
// pod name, in the form of blockio.resources.beta.kubernetes.io/pod.
func (b *builder) setClasses() error {
	if err := b.setBlockIO(); err != nil {
		return err
	}
	return b.setRDT()
}

func (b *builder) setBlockIO() error {
	name, own, pods := b.in.Config.GetMetadata().GetName(), b.in.Config.GetAnnotations(), b.in.Sandbox.GetAnnotations()
	class, err := blockio.ContainerClassFromAnnotations(name, own, pods)
	if err != nil {
		return invalid("blockio class of container", name, err.Error())
	}
	c := b.in.Node.Classes
	switch {
	case class == "" || b.in.Node.CgroupDisabled:
		return nil
	case c.BlockIO == nil && c.IgnoreNoBlockIO:
		b.warn("blockio class %s is ignored: this node has no blockio classes", show(class))
		return nil
	case c.BlockIO == nil:
		return impossible("blockio class", class, "this node has no blockio classes; set blockio_config_file, or ignore_blockio_not_enabled_errors")
	}
	limits, err := c.BlockIO(class)
	if err != nil {
		return impossible("blockio class", class, err.Error())
	}
	b.spec.Linux.Resources.BlockIO = limits
	return nil
}

func (b *builder) setRDT() error {
	name, own, pods := b.in.Config.GetMetadata().GetName(), b.in.Config.GetAnnotations(), b.in.Sandbox.GetAnnotations()
	c := b.in.Node.Classes
	class, _ := kubernetes.ContainerClassFromAnnotations(rdt.RdtContainerAnnotation, rdt.RdtPodAnnotation,
		rdt.RdtPodAnnotationContainerPrefix, name, own, pods)
	switch {
	case class == "":
		return nil
	case c.RDT == nil && c.IgnoreNoRDT:
		b.warn("RDT class %s is ignored: this node has no RDT classes", show(class))
		return nil
	case c.RDT == nil:
		return impossible("RDT class", class, errNoRDT.Error())
	}
	if err := c.RDT(name, own, pods); err != nil {
		return impossible("RDT class", class, err.Error())
	}
	b.spec.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: class}
	return nil
}

var errNoRDT = errors.New("this node has no RDT classes; set rdt_config_file on a processor that has them, or ignore_rdt_not_enabled_errors")
