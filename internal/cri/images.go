package cri

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
)

// handlerAnnotation names the handler of an image where clients older than
// ImageSpec.runtime_handler put it.
const handlerAnnotation = "io.containerd.cri.runtime-handler"

// PullImage fetches an image and gives its ID.
func (s *Server) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	snapshotter, platform, err := s.placeOf(r.GetImage())
	if err != nil {
		return nil, err
	}
	start := time.Now()
	img, err := s.images.Pull(ctx, image.PullRequest{Ref: r.GetImage().GetImage(), Auth: auth(r.GetAuth()), Snapshotter: snapshotter, Platform: platform})
	if s.observePull != nil {
		s.observePull(time.Since(start), int64(img.Size), err)
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: img.ID}, nil
}

// placeOf tells where an image's layers go and for which platform it is, both
// as the handler that it is for has it.
func (s *Server) placeOf(spec *runtimeapi.ImageSpec) (snapshotter, platform string, err error) {
	handler := spec.GetRuntimeHandler()
	if handler == "" {
		handler = spec.GetAnnotations()[handlerAnnotation]
	}
	if err := handlerName(handler); err != nil {
		return "", "", err
	}
	if snapshotter, err = s.snapshotter(handler); err != nil {
		return "", "", fmt.Errorf("image for handler %q: %w", handler, err)
	}
	return snapshotter, s.platform(handler), nil
}

// image finds the image that a specification means: a tag may stand for
// another one on each handler.
func (s *Server) image(ctx context.Context, spec *runtimeapi.ImageSpec) (image.Image, error) {
	snapshotter, platform, err := s.placeOf(spec)
	if err != nil {
		return image.Image{}, err
	}
	return s.images.GetFor(ctx, spec.GetImage(), snapshotter, platform)
}

func auth(a *runtimeapi.AuthConfig) *image.Auth {
	if a == nil {
		return nil
	}
	return &image.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(), ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
}

// ListImages lists images.
func (s *Server) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	found, err := s.listImages(ctx, r.GetFilter())
	return &runtimeapi.ListImagesResponse{Images: found}, err
}

// StreamImages lists images in several messages.
func (s *Server) StreamImages(r *runtimeapi.StreamImagesRequest, out grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	found, err := s.listImages(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return inBatches(out.Context(), found, func(items []*runtimeapi.Image) error {
		return out.Send(&runtimeapi.StreamImagesResponse{Images: items})
	})
}

func (s *Server) listImages(ctx context.Context, f *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	var found []image.Image
	if ref := f.GetImage().GetImage(); ref != "" {
		img, err := s.image(ctx, f.GetImage())
		switch {
		case errdefs.IsNotFound(err):
			return nil, nil
		case err != nil:
			return nil, err
		}
		found = []image.Image{img}
	} else {
		found = s.images.List()
	}
	items := make([]*runtimeapi.Image, 0, len(found))
	for _, img := range found {
		items = append(items, criImage(img))
	}
	return items, nil
}

func criImage(img image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Size: img.Size, Username: img.Username, Pinned: img.Pinned,
	}
	if img.UID != nil {
		out.Uid = &runtimeapi.Int64Value{Value: *img.UID}
	}
	return out
}

// ImageStatus tells of one image; an absent one is nil and no error.
func (s *Server) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	img, err := s.image(ctx, r.GetImage())
	switch {
	case errdefs.IsNotFound(err):
		return &runtimeapi.ImageStatusResponse{}, nil
	case err != nil:
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(img)}
	if r.GetVerbose() {
		if resp.Info, err = imageInfo(img); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// RemoveImage removes an image with all its names; an absent one is removed.
func (s *Server) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	_, platform, err := s.placeOf(r.GetImage())
	if err != nil {
		return nil, err
	}
	if err := unlessAbsent(s.images.RemoveFor(ctx, r.GetImage().GetImage(), platform)); err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo tells what images take on disk. The blobs of the content store
// are counted with the default snapshotter, beside which they lie: kubelet
// looks at the first entry alone, and would not collect images that fill the
// disk with blobs.
func (s *Server) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	usage, err := s.images.Usage(ctx)
	if err != nil {
		return nil, err
	}
	parts := usage.Snapshots
	if len(parts) == 0 {
		parts = []image.FilesystemUsage{{Dir: usage.Content.Dir}}
	}
	resp := &runtimeapi.ImageFsInfoResponse{}
	for i, part := range parts {
		if i == 0 {
			part.Bytes += usage.Content.Bytes
			part.Inodes += usage.Content.Inodes
		}
		fs := &runtimeapi.FilesystemUsage{
			Timestamp:  usage.At.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: part.Dir},
			UsedBytes:  &runtimeapi.UInt64Value{Value: part.Bytes},
			InodesUsed: &runtimeapi.UInt64Value{Value: part.Inodes},
		}
		resp.ImageFilesystems = append(resp.ImageFilesystems, fs)
	}
	// Writable layers are snapshots too.
	resp.ContainerFilesystems = resp.ImageFilesystems
	return resp, nil
}
