package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend"
	"golang.org/x/sys/unix"
)

// The state of host-local: in <dataDir>/<network> one file for each address,
// named after it, holding the container and its interface; last_reserved_ip.N;
// and a file on which whoever changes something holds a flock.
//
// The program reads all files to find those of one container. Here what the
// files say is remembered as long as the folder's time stamp shows that nobody
// else changed it, and what is remembered is read again before it is believed.

const (
	defaultDataDir = "/var/lib/cni/networks"
	lastPrefix     = "last_reserved_ip."
	lineBreak      = "\r\n"
	unfinished     = "reserving"
	lockPoll       = time.Millisecond
)

type stores struct {
	mu  sync.Mutex
	dir map[string]*folder
}

func newStores() *stores { return &stores{dir: map[string]*folder{}} }

// folder is what is remembered of one network. turn lets the process's own
// calls queue without polling the file lock, and guards the rest.
type folder struct {
	path  string
	turn  chan struct{}
	mtime time.Time
	byID  map[holder][]net.IP
}

type holder struct{ id, ifName string }

// store is a folder for one call.
type store struct {
	*folder
	ctx  context.Context
	lock *os.File
}

var _ backend.Store = (*store)(nil)

func (s *stores) open(ctx context.Context, dataDir, network string) (*store, error) {
	if dataDir == "" {
		dataDir = defaultDataDir
	}
	dir := filepath.Join(dataDir, network)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("host-local: make %s: %w", dir, err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("host-local: open lock: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.dir[dir]
	if f == nil {
		f = &folder{path: dir, turn: make(chan struct{}, 1)}
		s.dir[dir] = f
	}
	return &store{folder: f, ctx: ctx, lock: lock}, nil
}

func (s *store) Close() error { return s.lock.Close() }

// Lock waits for the process's turn and then for other processes, as long as
// the call may take.
func (s *store) Lock() error {
	select {
	case s.turn <- struct{}{}:
	case <-s.ctx.Done():
		return fmt.Errorf("host-local: wait for %s: %w", s.path, s.ctx.Err())
	}
	for {
		err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			<-s.turn
			return fmt.Errorf("host-local: lock %s: %w", s.lock.Name(), err)
		}
		select {
		case <-time.After(lockPoll):
		case <-s.ctx.Done():
			<-s.turn
			return fmt.Errorf("host-local: another process holds %s: %w", s.lock.Name(), s.ctx.Err())
		}
	}
}

func (s *store) Unlock() error {
	err := unix.Flock(int(s.lock.Fd()), unix.LOCK_UN)
	<-s.turn
	return err
}

func (s *store) Reserve(id, ifName string, ip net.IP, rangeID string) (bool, error) {
	if err := s.refresh(); err != nil {
		return false, err
	}
	path := filepath.Join(s.path, ip.String())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	// The file must appear with its content: one that a crash left empty would
	// be nobody's to give back. The lock keeps others out meanwhile.
	h := holder{strings.TrimSpace(id), ifName}
	next := filepath.Join(s.path, unfinished)
	if err := os.WriteFile(next, []byte(h.id+lineBreak+h.ifName), 0o600); err != nil {
		return false, errors.Join(err, os.Remove(next))
	}
	if err := os.Rename(next, path); err != nil {
		return false, err
	}
	s.byID[h] = append(s.byID[h], ip)
	err := os.WriteFile(filepath.Join(s.path, lastPrefix+rangeID), []byte(ip.String()), 0o600)
	s.stamp()
	return err == nil, err
}

func (s *store) LastReservedIP(rangeID string) (net.IP, error) {
	b, err := os.ReadFile(filepath.Join(s.path, lastPrefix+rangeID))
	if err != nil {
		return nil, err
	}
	return net.ParseIP(string(b)), nil
}

func (s *store) GetByID(id, ifName string) []net.IP {
	if err := s.refresh(); err != nil {
		return nil
	}
	id = strings.TrimSpace(id)
	ips := append([]net.IP(nil), s.byID[holder{id, ifName}]...)
	return append(ips, s.byID[holder{id, ""}]...) // as old versions wrote
}

func (s *store) ReleaseByID(id, ifName string) error {
	if err := s.refresh(); err != nil {
		return err
	}
	h := holder{strings.TrimSpace(id), ifName}
	if len(s.byID[h]) == 0 {
		h.ifName = ""
	}
	var errs []error
	for _, ip := range s.byID[h] {
		path := filepath.Join(s.path, ip.String())
		if have, err := readHolder(path); err != nil || have != h {
			continue
		}
		if err := os.Remove(path); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		s.byID = nil
		return fmt.Errorf("host-local: release addresses of %s: %w", id, errors.Join(errs...))
	}
	delete(s.byID, h)
	s.stamp()
	return nil
}

func (s *store) holders() []holder {
	if err := s.refresh(); err != nil {
		return nil
	}
	out := make([]holder, 0, len(s.byID))
	for h := range s.byID {
		out = append(out, h)
	}
	return out
}

// stamp remembers the folder as it is after a change of our own.
func (s *store) stamp() {
	st, err := os.Stat(s.path)
	if err != nil {
		s.byID = nil
		return
	}
	s.mtime = st.ModTime()
}

// refresh reads the files again if somebody else changed them.
func (s *store) refresh() error {
	st, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("host-local: %w", err)
	}
	if s.byID != nil && st.ModTime().Equal(s.mtime) {
		return nil
	}
	byID, err := readHolders(s.path)
	if err != nil {
		return err
	}
	s.byID, s.mtime = byID, st.ModTime()
	return nil
}

func readHolders(dir string) (map[holder][]net.IP, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("host-local: %w", err)
	}
	out := map[holder][]net.IP{}
	for _, e := range entries {
		ip := net.ParseIP(e.Name())
		if ip == nil {
			continue
		}
		h, err := readHolder(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("host-local: %w", err)
		}
		out[h] = append(out[h], ip)
	}
	return out, nil
}

func readHolder(path string) (holder, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return holder{}, err
	}
	id, ifName, _ := strings.Cut(strings.TrimSpace(string(b)), lineBreak)
	return holder{id, ifName}, nil
}

// Holders lists the containers that have an address in each network of a
// host-local configuration's data folder.
func Holders(conf []byte) (map[string][]string, error) {
	var c struct {
		IPAM struct {
			DataDir string `json:"dataDir"`
		} `json:"ipam"`
	}
	if err := json.Unmarshal(conf, &c); err != nil {
		return nil, fmt.Errorf("host-local: %w", err)
	}
	if c.IPAM.DataDir == "" {
		c.IPAM.DataDir = defaultDataDir
	}
	networks, err := os.ReadDir(c.IPAM.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("host-local: %w", err)
	}
	out := map[string][]string{}
	for _, n := range networks {
		if !n.IsDir() {
			continue
		}
		byID, err := readHolders(filepath.Join(c.IPAM.DataDir, n.Name()))
		if err != nil {
			return nil, err
		}
		for h := range byID {
			out[n.Name()] = append(out[n.Name()], h.id)
		}
	}
	return out, nil
}

// releaseEverywhere gives back all addresses of a container in host-local's
// usual folder, whatever the network.
func (s *stores) releaseEverywhere(ctx context.Context, id string) error {
	networks, err := os.ReadDir(defaultDataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("host-local: %w", err)
	}
	var errs []error
	for _, n := range networks {
		if n.IsDir() {
			errs = append(errs, s.releaseAll(ctx, n.Name(), id))
		}
	}
	return errors.Join(errs...)
}

func (s *stores) releaseAll(ctx context.Context, network, id string) error {
	st, err := s.open(ctx, "", network)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := st.Lock(); err != nil {
		return err
	}
	var errs []error
	for _, h := range st.holders() {
		if h.id == id {
			errs = append(errs, st.ReleaseByID(h.id, h.ifName))
		}
	}
	return errors.Join(append(errs, st.Unlock())...)
}
