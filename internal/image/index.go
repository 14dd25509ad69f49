package image

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// index answers List and Get from memory. It mirrors the image records of the
// metadata database; whoever changes those holds Store.records and changes the
// index next.
type index struct {
	pinned map[string]bool // full names of the configuration

	mu     sync.RWMutex
	images map[string]*indexed // by ID
	names  map[string]string   // record name, IDs included → ID
}

// indexed is an image with what its exported form is derived from.
type indexed struct {
	image  Image
	names  map[string]bool // records but the ID; true when labelled as pinned
	pinned bool            // the ID record is labelled as pinned
}

func newIndex(pinned []string) *index {
	x := &index{
		pinned: make(map[string]bool, len(pinned)),
		images: make(map[string]*indexed),
		names:  make(map[string]string),
	}
	for _, p := range pinned {
		if n, err := parseName(p); err == nil {
			x.pinned[n.String()] = true
		}
	}
	return x
}

// put records that name refers to img, taking the name from another image if
// that had it. It returns the image as readers see it.
func (x *index) put(img Image, pinned bool, names ...string) Image {
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.images[img.ID]
	if e == nil {
		e = &indexed{names: make(map[string]bool)}
		x.images[img.ID] = e
	}
	// Encrypted and plain forms of an image have one ID. Who has the plain one
	// needs no key for it, whatever else was pulled.
	if !img.encrypted || e.image.encrypted || e.image.ID == "" {
		e.image = img
	}
	for _, name := range names {
		if old, ok := x.names[name]; ok && old != img.ID {
			x.drop(old, name)
		}
		x.names[name] = img.ID
		if isID(name) {
			e.pinned = pinned
		} else {
			e.names[name] = pinned
		}
	}
	x.derive(e)
	return e.image
}

// drop forgets one name of an image. x.mu is held.
func (x *index) drop(id, name string) {
	delete(x.names, name)
	if e := x.images[id]; e != nil {
		delete(e.names, name)
		x.derive(e)
	}
}

// derive fills the fields of the image that follow from its names. The slices
// are made anew: readers hold the old ones.
func (x *index) derive(e *indexed) {
	e.image.RepoTags, e.image.RepoDigests = nil, nil
	e.image.Pinned = e.pinned
	for record, pinned := range e.names {
		name := plainName(record)
		if strings.Contains(name, "@") {
			e.image.RepoDigests = append(e.image.RepoDigests, name)
		} else {
			e.image.RepoTags = append(e.image.RepoTags, name)
		}
		e.image.Pinned = e.image.Pinned || pinned || x.pinned[name]
	}
	for _, list := range []*[]string{&e.image.RepoTags, &e.image.RepoDigests} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
}

// remove forgets an image and all its names.
func (x *index) remove(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.images[id]
	if e == nil {
		return
	}
	for name := range e.names {
		delete(x.names, name)
	}
	delete(x.names, id)
	delete(x.images, id)
}

// records lists the names under which an image is recorded, its ID included.
func (x *index) records(id string) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e := x.images[id]
	if e == nil {
		return nil
	}
	out := make([]string, 0, len(e.names)+1)
	for name := range e.names {
		out = append(out, name)
	}
	return append(out, id)
}

func (x *index) list() []Image {
	x.mu.RLock()
	out := make([]Image, 0, len(x.images))
	for _, e := range x.images {
		out = append(out, e.image)
	}
	x.mu.RUnlock()
	slices.SortFunc(out, func(a, b Image) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// get finds an image by ID, by name, or by the unambiguous beginning of its ID,
// in that order: a name may look like hexadecimal digits. A name is that of the
// platform's image; for the node's own platform, any other's when it has none.
func (x *index) get(ref, platform string) (Image, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if e := x.images[ref]; e != nil {
		return e.image, nil
	}
	if e := x.images["sha256:"+ref]; e != nil {
		return e.image, nil
	}
	if img, ok := x.named(ref, platform); ok {
		return img, nil
	}
	named, parseErr := parseName(ref)
	if parseErr == nil {
		if img, ok := x.named(named.String(), platform); ok {
			return img, nil
		}
	}
	if img, ok, err := x.byPrefix(strings.TrimPrefix(ref, "sha256:")); ok || err != nil {
		return img, err
	}
	if parseErr != nil && !isHex(strings.TrimPrefix(ref, "sha256:")) {
		return Image{}, parseErr
	}
	return Image{}, fmt.Errorf("image %s: %w", quoted(ref), errdefs.ErrNotFound)
}

// named finds the image of a full name. x.mu is held.
func (x *index) named(name, platform string) (Image, bool) {
	id, ok := x.names[recordName(name, platform)]
	if !ok && platform == "" {
		for _, record := range slices.Sorted(maps.Keys(x.names)) {
			if plainName(record) == name {
				id, ok = x.names[record], true
				break
			}
		}
	}
	if !ok {
		return Image{}, false
	}
	return x.images[id].image, true
}

func (x *index) byPrefix(prefix string) (img Image, found bool, err error) {
	if !isHex(prefix) {
		return Image{}, false, nil
	}
	for id, e := range x.images {
		if !strings.HasPrefix(strings.TrimPrefix(id, "sha256:"), prefix) {
			continue
		}
		if found {
			return Image{}, false, fmt.Errorf("image ID %q begins several IDs: %w", prefix, errdefs.ErrInvalidArgument)
		}
		img, found = e.image, true
	}
	return img, found, nil
}
