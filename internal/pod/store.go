package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
	boltErrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/shim"
)

// sandboxRecord is what pods.db keeps of a sandbox.
type sandboxRecord struct {
	Sandbox
	Name        string // reserved name, unique among sandboxes
	Hash        string // of the request
	HandlerName string // the handler that "" stood for
	// Runtime is the handler as it was when the sandbox was made, whatever became
	// of its configuration since.
	Runtime shim.Runtime
	// Whole: Runtime is. Records of older daemons have what it takes to end it.
	Whole      bool
	Phase      phase
	NetworkUp  bool // addresses may be allocated
	Sysctls    map[string]string
	SharePID   bool
	UIDs, GIDs []idMapping
	// CgroupParent holds the containers' cgroups.
	CgroupParent string
	// SELinux labels of the pod's processes and mounts; empty where it is off.
	ProcessLabel, MountLabel string
}

// containerRecord is what pods.db keeps of a container.
type containerRecord struct {
	Container
	Name   string
	Hash   string
	Phase  phase
	Signal string // asks the container to end, as oci.ParseSignal reads it
	Rev    uint64 // how often it was changed
}

type idMapping struct{ Container, Host, Length uint32 }

const (
	sandboxBucket   = "sandboxes"
	containerBucket = "containers"
)

// store is pods.db: one record an id, each change a synced transaction; and
// beside it the notes, see notes.go.
type store struct {
	db    *bolt.DB
	notes string // folder
}

func openStore(path, notes string) (*store, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if errors.Is(err, boltErrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use: another daemon runs with the same root", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range []string{sandboxBucket, containerBucket, damagedBucket} {
			if _, err := tx.CreateBucketIfNotExists([]byte(b)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("prepare %s: %w", path, err)
	}
	return &store{db: db, notes: notes}, nil
}

func (s *store) close() error { return s.db.Close() }

func (s *store) put(bucket, id string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode the record of %s: %w", id, err)
	}
	err = s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(id), data) })
	if err != nil {
		return fmt.Errorf("write the record of %s to the pod store: %w", id, err)
	}
	return nil
}

func (s *store) delete(bucket, id string) error {
	err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete([]byte(id)) })
	if err != nil {
		return fmt.Errorf("delete the record of %s from the pod store: %w", id, err)
	}
	return nil
}

// load reads all records of a bucket, and gives those that cannot be read
// beside them.
func load[R any, P interface {
	*R
	check(id string) error
}](s *store, bucket string) (all []*R, bad []damaged, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
			r := new(R)
			cause := json.Unmarshal(v, r)
			if cause == nil {
				cause = P(r).check(string(k))
			}
			if cause == nil {
				all = append(all, r)
			} else {
				bad = append(bad, damaged{bucket: bucket, id: string(k), cause: cause})
			}
			return nil
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read the records of the pod store: %w", err)
	}
	return all, bad, nil
}

// The CRI messages inside the records are kept in their own encoding, so that
// unknown fields of a newer client survive.

type sandboxFields Sandbox

type sandboxJSON struct {
	sandboxFields
	Config, Overhead, Resources []byte
}

// MarshalJSON implements json.Marshaler.
func (r sandboxRecord) MarshalJSON() ([]byte, error) {
	type rest sandboxRecord
	var out struct {
		rest
		Sandbox sandboxJSON
	}
	out.rest = rest(r)
	out.Sandbox.sandboxFields = sandboxFields(r.Sandbox)
	var err error
	if out.Sandbox.Config, err = proto.Marshal(r.Config); err != nil {
		return nil, err
	}
	if out.Sandbox.Overhead, err = marshalOptional(r.Overhead); err != nil {
		return nil, err
	}
	if out.Sandbox.Resources, err = marshalOptional(r.Resources); err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *sandboxRecord) UnmarshalJSON(data []byte) error {
	type rest sandboxRecord
	var in struct {
		rest
		Sandbox sandboxJSON
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	*r = sandboxRecord(in.rest)
	r.Sandbox = Sandbox(in.Sandbox.sandboxFields)
	r.Config = &runtimeapi.PodSandboxConfig{}
	return errors.Join(
		proto.Unmarshal(in.Sandbox.Config, r.Config),
		unmarshalOptional(in.Sandbox.Overhead, &r.Overhead),
		unmarshalOptional(in.Sandbox.Resources, &r.Resources))
}

type containerFields Container

type containerJSON struct {
	containerFields
	Config, User, Resources []byte
	Mounts                  [][]byte
}

// MarshalJSON implements json.Marshaler.
func (r containerRecord) MarshalJSON() ([]byte, error) {
	type rest containerRecord
	var out struct {
		rest
		Container containerJSON
	}
	out.rest = rest(r)
	out.Container.containerFields = containerFields(r.Container)
	var err error
	if out.Container.Config, err = proto.Marshal(r.Config); err != nil {
		return nil, err
	}
	if out.Container.User, err = marshalOptional(r.User); err != nil {
		return nil, err
	}
	if out.Container.Resources, err = marshalOptional(r.Resources); err != nil {
		return nil, err
	}
	for _, m := range r.Mounts {
		b, err := proto.Marshal(m)
		if err != nil {
			return nil, err
		}
		out.Container.Mounts = append(out.Container.Mounts, b)
	}
	return json.Marshal(out)
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *containerRecord) UnmarshalJSON(data []byte) error {
	type rest containerRecord
	var in struct {
		rest
		Container containerJSON
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	*r = containerRecord(in.rest)
	r.Container = Container(in.Container.containerFields)
	r.Config = &runtimeapi.ContainerConfig{}
	r.Mounts = nil
	for _, b := range in.Container.Mounts {
		m := &runtimeapi.Mount{}
		if err := proto.Unmarshal(b, m); err != nil {
			return err
		}
		r.Mounts = append(r.Mounts, m)
	}
	return errors.Join(
		proto.Unmarshal(in.Container.Config, r.Config),
		unmarshalOptional(in.Container.User, &r.User),
		unmarshalOptional(in.Container.Resources, &r.Resources))
}

func marshalOptional[T any, P interface {
	*T
	proto.Message
}](m P) ([]byte, error) {
	if m == nil {
		return nil, nil
	}
	return proto.Marshal(m)
}

func unmarshalOptional[T any, P interface {
	*T
	proto.Message
}](data []byte, m *P) error {
	if data == nil {
		*m = nil
		return nil
	}
	*m = new(T)
	return proto.Unmarshal(data, *m)
}
