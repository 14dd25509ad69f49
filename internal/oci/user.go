package oci

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/osutil"
)

const (
	// maxAccountFile bounds /etc/passwd and /etc/group of a hostile image.
	maxAccountFile = 1 << 20
	// maxUserName bounds USER and its two parts.
	maxUserName = 256
	// maxGroups is the kernel's NGROUPS_MAX.
	maxGroups = 65536
)

// identity is who a container runs as, before its image is asked.
type identity struct {
	user, group string // name or decimal id; group may be empty
	field       string // where user came from, for errors
}

// wanted picks the identity: the security context's before the image's.
func wanted(sc *runtimeapi.LinuxContainerSecurityContext, image string) (identity, error) {
	id := identity{user: "0", field: "user"}
	switch {
	case sc.GetRunAsUsername() != "":
		id.user, id.field = sc.GetRunAsUsername(), "run_as_username"
	case sc.GetRunAsUser() != nil:
		id.user, id.field = strconv.FormatInt(sc.GetRunAsUser().GetValue(), 10), "run_as_user"
	case image != "":
		if err := checkUser(image); err != nil {
			return identity{}, err
		}
		user, group, _ := strings.Cut(image, ":")
		if user != "" {
			id.user = user
		}
		id.group, id.field = group, "USER of the image"
	}
	if g := sc.GetRunAsGroup(); g != nil {
		id.group = strconv.FormatInt(g.GetValue(), 10)
	}
	return id, nil
}

// checkUser checks the shape of an image's USER: user, uid, user:group,
// uid:gid, and the mixtures.
func checkUser(user string) error {
	switch {
	case len(user) > maxUserName:
		return invalid("USER of the image", user, "it has more than 256 bytes; use another image or set run_as_user")
	case !printable(user) || strings.ContainsAny(user, "\u2028\u2029"):
		return invalid("USER of the image", user, "control characters are not allowed; use another image or set run_as_user")
	case strings.Count(user, ":") > 1:
		return invalid("USER of the image", user, "the form is user[:group]; use another image or set run_as_user")
	}
	return nil
}

// parseID reads a decimal id. ok is false for what is a name; ids beyond int32
// are errors because runtimes would wrap or refuse them.
func parseID(field, s string) (id uint32, ok bool, err error) {
	digits := strings.TrimPrefix(s, "-")
	if digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, false, nil
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v > math.MaxInt32 {
		return 0, false, invalid(field, s, "ids lie between 0 and 2147483647")
	}
	return uint32(v), true, nil
}

// accountFiles are /etc/passwd and /etc/group beneath a root file system, each
// read at most once.
type accountFiles struct {
	root   string
	passwd []byte
	group  []byte
	done   struct{ passwd, group bool }
}

func (a *accountFiles) users() (iter.Seq[passwdEntry], error) {
	if !a.done.passwd {
		data, err := readAccountFile(a.root, "/etc/passwd")
		if err != nil {
			return nil, err
		}
		a.passwd, a.done.passwd = data, true
	}
	return parsePasswd(a.passwd), nil
}

func (a *accountFiles) groups() (iter.Seq[groupEntry], error) {
	if !a.done.group {
		data, err := readAccountFile(a.root, "/etc/group")
		if err != nil {
			return nil, err
		}
		a.group, a.done.group = data, true
	}
	return parseGroup(a.group), nil
}

// readAccountFile reads a file of the image; an absent one is empty. The file
// is opened without blocking, since an image may put a FIFO there.
func readAccountFile(root, path string) ([]byte, error) {
	if root == "" {
		return nil, nil
	}
	f, err := osutil.OpenInRoot(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up the user in the image: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look up the user in the image: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, invalid("file of the image", path, "it is not a regular file; use another image")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxAccountFile+1))
	if err != nil {
		return nil, fmt.Errorf("look up the user in the image: read %s: %w", path, err)
	}
	if len(data) > maxAccountFile {
		return nil, invalid("file of the image", path, "it has more than 1 MiB; use another image")
	}
	return data, nil
}

// passwdEntry is a line of passwd(5); the ids are not checked yet.
type passwdEntry struct{ name, uid, gid, home string }

// groupEntry is a line of group(5); the id is not checked yet.
type groupEntry struct {
	name, gid string
	members   string
}

// parsePasswd yields the lines that have the form of an account and skips the
// others, as every libc does.
func parsePasswd(data []byte) iter.Seq[passwdEntry] {
	return func(yield func(passwdEntry) bool) {
		for line := range bytes.Lines(data) {
			f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
			if len(f) < 4 || f[0] == "" || f[0][0] == '#' || f[0][0] == '+' || f[0][0] == '-' {
				continue
			}
			e := passwdEntry{name: f[0], uid: f[2], gid: f[3]}
			if len(f) > 5 {
				e.home = f[5]
			}
			if !yield(e) {
				return
			}
		}
	}
}

func parseGroup(data []byte) iter.Seq[groupEntry] {
	return func(yield func(groupEntry) bool) {
		for line := range bytes.Lines(data) {
			f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
			if len(f) < 3 || f[0] == "" || f[0][0] == '#' || f[0][0] == '+' || f[0][0] == '-' {
				continue
			}
			e := groupEntry{name: f[0], gid: f[2]}
			if len(f) > 3 {
				e.members = f[3]
			}
			if !yield(e) {
				return
			}
		}
	}
}

func (e groupEntry) has(user string) bool {
	for member := range strings.SplitSeq(e.members, ",") {
		if member == user {
			return true
		}
	}
	return false
}

// account is a resolved user.
type account struct {
	name     string // empty when the image does not know the id
	uid, gid uint32
	home     string
}

// resolve looks an identity up in the image.
func (a *accountFiles) resolve(id identity) (account, error) {
	who, err := a.lookUpUser(id)
	if err != nil || id.group == "" {
		return who, err
	}
	field := "group of " + id.field
	gid, numeric, err := parseID(field, id.group)
	if err != nil {
		return account{}, err
	}
	if !numeric {
		if gid, err = a.lookUpGroup(field, id.group); err != nil {
			return account{}, err
		}
	}
	who.gid = gid
	return who, nil
}

func (a *accountFiles) lookUpUser(id identity) (account, error) {
	uid, numeric, err := parseID(id.field, id.user)
	if err != nil {
		return account{}, err
	}
	if !numeric && a.root == "" {
		return account{}, impossible(id.field, id.user, "the image is not mounted on this node, so names cannot be looked up; give a number")
	}
	users, err := a.users()
	if err != nil {
		return account{}, err
	}
	for e := range users {
		entryUID, ok, err := parseID("uid in /etc/passwd of the image", e.uid)
		if numeric && (err != nil || !ok || entryUID != uid) {
			continue
		}
		if !numeric && e.name != id.user {
			continue
		}
		if err != nil {
			return account{}, err
		}
		gid, okGID, err := parseID("gid in /etc/passwd of the image", e.gid)
		if err != nil {
			return account{}, err
		}
		if ok && okGID {
			return account{name: e.name, uid: entryUID, gid: gid, home: e.home}, nil
		}
	}
	if !numeric {
		return account{}, invalid(id.field, id.user, "/etc/passwd of the image has no such user; use a name that it has, or a number")
	}
	return account{uid: uid}, nil
}

func (a *accountFiles) lookUpGroup(field, name string) (uint32, error) {
	if a.root == "" {
		return 0, impossible(field, name, "the image is not mounted on this node, so names cannot be looked up; give a number")
	}
	groups, err := a.groups()
	if err != nil {
		return 0, err
	}
	for e := range groups {
		if e.name != name {
			continue
		}
		gid, ok, err := parseID("gid in /etc/group of the image", e.gid)
		if err != nil {
			return 0, err
		}
		if ok {
			return gid, nil
		}
	}
	return 0, invalid(field, name, "/etc/group of the image has no such group; use a name that it has, or a number")
}

// memberships returns the groups of /etc/group that list the user.
func (a *accountFiles) memberships(user string) ([]uint32, error) {
	if user == "" {
		return nil, nil
	}
	groups, err := a.groups()
	if err != nil {
		return nil, err
	}
	var gids []uint32
	for e := range groups {
		if !e.has(user) {
			continue
		}
		gid, ok, err := parseID("gid in /etc/group of the image", e.gid)
		if err != nil {
			return nil, err
		}
		if ok {
			gids = append(gids, gid)
		}
	}
	return gids, nil
}

// setUser resolves the user and all groups, so that the runtime has nothing to
// look up: the list is complete and begins with nothing inherited.
func (b *builder) setUser() error {
	id, err := wanted(b.sc, b.in.Image.User)
	if err != nil {
		return err
	}
	files := &accountFiles{root: b.in.Rootfs}
	who, err := files.resolve(id)
	if err != nil {
		return err
	}
	gids := []uint32{who.gid}
	if b.sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge {
		more, err := files.memberships(who.name)
		if err != nil {
			return err
		}
		gids = append(gids, more...)
	}
	for _, g := range b.sc.GetSupplementalGroups() {
		gids = append(gids, uint32(g))
	}
	slices.Sort(gids)
	gids = slices.Compact(gids)
	if len(gids) > maxGroups {
		return invalid("number of supplementary groups", len(gids), "the kernel takes at most 65536")
	}
	b.spec.Process.User = specs.User{UID: who.uid, GID: who.gid, AdditionalGids: gids}
	b.res.User = containerUser(b.spec.Process.User)
	b.setHome(who.home)
	return nil
}

// setHome gives HOME to a container that has none, as runtimes do, from the
// image's passwd when it holds an honest path.
func (b *builder) setHome(home string) {
	if !filepath.IsAbs(home) || !printable(home) || len(home) > maxPath {
		home = "/"
	}
	if _, ok := lookUpEnv(b.spec.Process.Env, "HOME"); !ok {
		b.spec.Process.Env = append(b.spec.Process.Env, "HOME="+home)
	}
}

func containerUser(u specs.User) *runtimeapi.ContainerUser {
	linux := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		linux.SupplementalGroups = append(linux.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: linux}
}
