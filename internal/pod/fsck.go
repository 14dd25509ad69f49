package pod

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// Finding is something on the machine that no sandbox or container owns, or a
// record whose things are gone.
type Finding struct {
	Kind     string // shim, bundle, netns, volume, snapshot, network, cgroup or record
	ID       string // of the sandbox, container or snapshot
	Path     string // where on the machine, if it has a path
	Detail   string // what is wrong, in a sentence
	Repaired bool
	Err      string // why the repair failed
}

// fsckTime bounds a whole check, whatever hangs.
const fsckTime = 2 * time.Minute

// orphan is a thing without an owner and the way to remove it.
type orphan struct {
	Finding
	owner  string // the id that would own it
	remove func(context.Context) error
}

// Fsck compares the store with the machine and lists what does not fit; with
// repair it removes that. It may run while pods come and go.
//
// Why nothing that is being made can be hit: everything on the machine is made
// after its id is known, and ids are never used twice. So what is listed
// before the known ids are read, and is not among them, has no owner any more.
// What is still there in a second listing was not just being removed either.
func (s *Service) Fsck(ctx context.Context, repair bool) ([]Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, fsckTime)
	defer cancel()
	first, err := s.listOwned(ctx)
	if err != nil {
		return nil, err
	}
	known, err := s.knownIDs()
	if err != nil {
		return nil, err
	}
	suspects := map[string]bool{}
	for _, o := range first {
		if !known[o.owner] {
			suspects[o.Kind+" "+o.Path+" "+o.ID] = true
		}
	}
	var found []Finding
	if len(suspects) > 0 {
		if found, err = s.secondLook(ctx, suspects, repair); err != nil {
			return found, err
		}
	}
	records, err := s.checkRecords(ctx, repair)
	return append(found, records...), err
}

// secondLook waits a moment, for what another program on this machine was just
// making in a place that it shares with us, and takes the suspects that are
// still there.
func (s *Service) secondLook(ctx context.Context, suspects map[string]bool, repair bool) ([]Finding, error) {
	select {
	case <-time.After(secondLookAfter):
	case <-ctx.Done():
		return nil, fmt.Errorf("check: %w", ctx.Err())
	}
	again, err := s.listOwned(ctx)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, o := range again {
		if !suspects[o.Kind+" "+o.Path+" "+o.ID] {
			continue
		}
		if repair {
			if err := o.remove(ctx); err != nil {
				o.Err = err.Error()
			} else {
				o.Repaired = true
			}
		}
		found = append(found, o.Finding)
	}
	return found, nil
}

const secondLookAfter = time.Second

// listOwned lists everything on the machine that should have an owner, in the
// order in which it has to be removed.
func (s *Service) listOwned(ctx context.Context) ([]orphan, error) {
	var all []orphan
	for _, list := range []func(context.Context) ([]orphan, error){
		s.listShim, s.listBundles, s.listPodFolders, s.listVolumes, s.listSnapshots, s.listNetwork, s.listCgroups,
	} {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("check: %w", err)
		}
		some, err := list(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// knownIDs gives the ids of all sandboxes and containers that exist, are being
// made or have a record.
func (s *Service) knownIDs() (map[string]bool, error) {
	known := map[string]bool{}
	s.attempts.mu.Lock()
	for _, at := range s.attempts.byName {
		known[at.id] = true
	}
	s.attempts.mu.Unlock()
	for _, sb := range s.index.allSandboxes() {
		known[sb.get().ID] = true
	}
	for _, c := range s.index.allContainers() {
		known[c.get().ID] = true
	}
	stored, err := s.store.ids(sandboxBucket, containerBucket)
	if err != nil {
		return nil, err
	}
	noted, err := s.store.noted()
	if err != nil {
		return nil, err
	}
	for _, id := range append(stored, noted...) {
		known[id] = true
	}
	return known, nil
}

func (s *Service) listShim(context.Context) ([]orphan, error) {
	if s.o.Shims == nil {
		return nil, nil
	}
	held, err := s.o.Shims.Held()
	if err != nil {
		return nil, err
	}
	var all []orphan
	for _, h := range held {
		if !isID(h.ID) {
			continue // not put there by us
		}
		all = append(all, orphan{owner: h.ID, Finding: Finding{Kind: "shim", ID: h.ID, Path: h.Path,
			Detail: "the shim holds a " + h.Kind + " that no pod or container has"},
			remove: func(ctx context.Context) error { return s.o.Shims.Release(ctx, h) }})
	}
	return all, nil
}

func (s *Service) listSnapshots(ctx context.Context) ([]orphan, error) {
	if s.o.Images == nil {
		return nil, nil
	}
	keys, err := s.o.Images.Rootfs(ctx)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var all []orphan
	for _, key := range keys {
		id := snapshotOwner(key)
		if id == "" {
			continue
		}
		all = append(all, orphan{owner: id, Finding: Finding{Kind: "snapshot", ID: key,
			Detail: "root file system or image volume of a container that does not exist"},
			remove: func(ctx context.Context) error { return s.o.Images.RemoveRootfs(ctx, key) }})
	}
	return all, nil
}

// snapshotOwner gives the container whose root file system or image volume a
// snapshot key names, "" for keys that are not ours.
func snapshotOwner(key string) string {
	if len(key) < idLength || !isID(key[:idLength]) {
		return ""
	}
	var n int
	if rest := key[idLength:]; rest != "" {
		if _, err := fmt.Sscanf(rest, "-image-%d", &n); err != nil || key != imageVolumeKey(key[:idLength], n) {
			return ""
		}
	}
	return key[:idLength]
}

func (s *Service) listNetwork(ctx context.Context) ([]orphan, error) {
	if s.o.Network == nil {
		return nil, nil
	}
	ids, err := s.o.Network.Allocations(ctx)
	if err != nil {
		return nil, fmt.Errorf("list network allocations: %w", err)
	}
	var all []orphan
	for _, id := range ids {
		if !isID(id) {
			continue
		}
		all = append(all, orphan{owner: id, Finding: Finding{Kind: "network", ID: id,
			Detail: "addresses or ports are held for a pod that does not exist"},
			remove: func(ctx context.Context) error { return s.o.Network.Detach(ctx, networkOf(id)) }})
	}
	return all, nil
}

func (s *Service) listVolumes(context.Context) ([]orphan, error) {
	return listFolders(filepath.Join(s.o.Root, "volumes"), "volume", "volumes of a container that does not exist",
		func(_ context.Context, dir string) error { return removeTree(dir) })
}

func (s *Service) listBundles(context.Context) ([]orphan, error) {
	return listFolders(filepath.Join(s.o.State, "containers"), "bundle", "bundle of a container that does not exist",
		func(_ context.Context, dir string) error {
			if n := livingIn(dir); n > 0 {
				return fmt.Errorf("%d processes of it still run; end them, then check again", n)
			}
			return removeTree(dir)
		})
}

func (s *Service) listPodFolders(context.Context) ([]orphan, error) {
	return listFolders(filepath.Join(s.o.State, "pods"), "netns", "folder and namespaces of a pod that does not exist",
		func(_ context.Context, dir string) error { return removeTree(dir) })
}

// isID tells whether a name has the form of our ids.
func isID(name string) bool {
	if len(name) != idLength {
		return false
	}
	for _, c := range []byte(name) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

var errStillMounted = errors.New("something is still mounted below it")
