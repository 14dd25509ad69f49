package oci

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func id(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

func TestUser(t *testing.T) {
	const strict = runtimeapi.SupplementalGroupsPolicy_Strict
	for name, c := range map[string]struct {
		sc       *runtimeapi.LinuxContainerSecurityContext
		image    string
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		"nobody named":            {uid: 0, gid: 0, groups: []uint32{0, 1, 10}, home: "/root"},
		"image uid":               {image: "1002", uid: 1002, gid: 0, groups: []uint32{0}, home: "/"},
		"image known uid":         {image: "1000", uid: 1000, gid: 1000, groups: []uint32{1000, 50000}, home: "/home/default"},
		"image name":              {image: "www-data", uid: 33, gid: 33, groups: []uint32{33}, home: "/var/www"},
		"image uid and gid":       {image: "1003:1004", uid: 1003, gid: 1004, groups: []uint32{1004}, home: "/"},
		"image name and gid":      {image: "www-data:1004", uid: 33, gid: 1004, groups: []uint32{1004}, home: "/var/www"},
		"image uid and group":     {image: "7:www-data", uid: 7, gid: 33, groups: []uint32{33}, home: "/"},
		"image name and group":    {image: "daemon:bin", uid: 1, gid: 1, groups: []uint32{1}, home: "/"},
		"image group only":        {image: ":33", uid: 0, gid: 33, groups: []uint32{0, 1, 10, 33}, home: "/root"},
		"image trailing colon":    {image: "www-data:", uid: 33, gid: 33, groups: []uint32{33}, home: "/var/www"},
		"run_as_user over image":  {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1001)}, image: "www-data", uid: 1001, gid: 0, groups: []uint32{0}, home: "/"},
		"run_as_user and group":   {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1001), RunAsGroup: id(1002)}, uid: 1001, gid: 1002, groups: []uint32{1002}, home: "/"},
		"run_as_username":         {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "www-data", RunAsGroup: id(5)}, uid: 33, gid: 5, groups: []uint32{5}, home: "/var/www"},
		"run_as_username decimal": {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "33"}, uid: 33, gid: 33, groups: []uint32{33}, home: "/var/www"},
		"merge": {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1000), SupplementalGroups: []int64{1234}},
			uid: 1000, gid: 1000, groups: []uint32{1000, 1234, 50000}, home: "/home/default"},
		"strict": {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1000), SupplementalGroups: []int64{1234, 1234}, SupplementalGroupsPolicy: strict},
			uid: 1000, gid: 1000, groups: []uint32{1000, 1234}, home: "/home/default"},
		"strict without groups": {sc: &runtimeapi.LinuxContainerSecurityContext{SupplementalGroupsPolicy: strict}, groups: []uint32{0}, home: "/root"},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			in.Config.Linux.SecurityContext = c.sc
			in.Image.User = c.image
			slices.Sort(c.groups)
			res := build(t, in)
			u := res.Spec.Process.User
			if u.UID != c.uid || u.GID != c.gid || !slices.Equal(u.AdditionalGids, c.groups) {
				t.Errorf("user is %+v, want %d:%d %v", u, c.uid, c.gid, c.groups)
			}
			l := res.User.GetLinux()
			if l.GetUid() != int64(c.uid) || l.GetGid() != int64(c.gid) || len(l.GetSupplementalGroups()) != len(c.groups) {
				t.Errorf("status says %v", l)
			}
			if got, _ := lookUpEnv(res.Spec.Process.Env, "HOME"); got != c.home {
				t.Errorf("HOME is %q, want %q", got, c.home)
			}
		})
	}
}

func TestUserRefused(t *testing.T) {
	for name, c := range map[string]struct {
		sc    *runtimeapi.LinuxContainerSecurityContext
		image string
		word  string
	}{
		"unknown name":     {image: "ghost", word: "/etc/passwd"},
		"unknown group":    {image: "1:ghosts", word: "/etc/group"},
		"three parts":      {image: "a:b:c", word: "USER"},
		"newline":          {image: "root\n", word: "control"},
		"long":             {image: strings.Repeat("u", 300), word: "256"},
		"signed":           {image: "-1", word: "2147483647"},
		"plus is a name":   {image: "+0", word: "/etc/passwd"},
		"hex is a name":    {image: "0x0", word: "/etc/passwd"},
		"gid too large":    {image: "0:2147483648", word: "2147483647"},
		"passwd uid wraps": {image: "high", word: "2147483647"},
		"group alone":      {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsGroup: id(1)}, word: "run_as_user"},
		"both":             {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1), RunAsUsername: "root"}, word: "only one"},
		"negative user":    {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(-1)}, word: "run_as_user"},
		"wrapping user":    {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1 << 32)}, word: "run_as_user"},
		"wrapping group":   {sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(1), RunAsGroup: id(1 << 32)}, word: "run_as_group"},
		"negative groups":  {sc: &runtimeapi.LinuxContainerSecurityContext{SupplementalGroups: []int64{-5}}, word: "supplemental_groups"},
		"unknown policy":   {sc: &runtimeapi.LinuxContainerSecurityContext{SupplementalGroupsPolicy: 9}, word: "supplemental_groups_policy"},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			in.Config.Linux.SecurityContext = c.sc
			in.Image.User = c.image
			refuse(t, in, errdefs.ErrInvalidArgument, c.word)
		})
	}
	in := typical(t)
	in.Config.Linux.SecurityContext = nil
	in.Rootfs, in.Image.User = "", "www-data"
	refuse(t, in, errdefs.ErrFailedPrecondition, "give a number")
	in.Image.User = "33:34"
	if u := build(t, in).Spec.Process.User; u.UID != 33 || u.GID != 34 {
		t.Errorf("user without root file system is %+v", u)
	}
}

func TestAccountFilesOfHostileImages(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "passwd")
	write(t, outside, "leak:x:4242:4242::/:\n")
	for name, c := range map[string]struct {
		make func(root, file string) error
		bad  bool
	}{
		"absent":             {make: func(_, file string) error { return os.Remove(file) }},
		"etc is a file":      {make: func(root, _ string) error { return etcIsAFile(root) }},
		"absolute link":      {make: func(_, file string) error { return relink(file, outside) }},
		"climbing link":      {make: func(_, file string) error { return relink(file, strings.Repeat("../", 40)+outside) }},
		"fifo":               {make: func(_, file string) error { _ = os.Remove(file); return syscall.Mkfifo(file, 0o644) }, bad: true},
		"folder":             {make: func(_, file string) error { _ = os.Remove(file); return os.Mkdir(file, 0o755) }, bad: true},
		"sparse giant":       {make: func(_, file string) error { return os.Truncate(file, 1<<40) }, bad: true},
		"link to itself":     {make: func(_, file string) error { return relink(file, "passwd") }, bad: true},
		"link into its proc": {make: func(_, file string) error { return relink(file, "/proc/self/environ") }},
	} {
		t.Run(name, func(t *testing.T) {
			root := testRootfs(t)
			if err := c.make(root, filepath.Join(root, "etc/passwd")); err != nil {
				t.Fatal(err)
			}
			who, err := (&accountFiles{root: root}).resolve(identity{user: "4242", field: "USER"})
			if c.bad && err == nil {
				t.Errorf("got %+v, want an error", who)
			}
			if !c.bad && (err != nil || who.name != "" || who.gid != 0) {
				t.Errorf("got %+v, %v, want the bare id", who, err)
			}
		})
	}
}

func relink(file, target string) error {
	if err := os.Remove(file); err != nil {
		return err
	}
	return os.Symlink(target, file)
}

func etcIsAFile(root string) error {
	if err := os.RemoveAll(filepath.Join(root, "etc")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "etc"), nil, 0o644)
}

func TestLinksInsideTheImageAreFollowed(t *testing.T) {
	root := testRootfs(t)
	write(t, filepath.Join(root, "usr/share/accounts"), "inside:x:7:8::/:\n")
	if err := relink(filepath.Join(root, "etc/passwd"), "/usr/share/accounts"); err != nil {
		t.Fatal(err)
	}
	who, err := (&accountFiles{root: root}).resolve(identity{user: "inside", field: "USER"})
	if err != nil || who.uid != 7 || who.gid != 8 {
		t.Errorf("got %+v, %v", who, err)
	}
}

func FuzzUser(f *testing.F) {
	for _, s := range []string{"", "0", "root", "1000:1000", "4294967296", "-1", "a:b:c", "root\n", "ghost"} {
		f.Add(s, testPasswd, testGroup)
	}
	f.Fuzz(func(t *testing.T, user, passwd, group string) {
		b := &accountFiles{root: "/nonexistent", passwd: []byte(passwd), group: []byte(group)}
		b.done.passwd, b.done.group = true, true
		id, err := wanted(nil, user)
		if err != nil {
			return
		}
		who, err := b.resolve(id)
		if err != nil {
			return
		}
		if who.uid > 1<<31-1 || who.gid > 1<<31-1 {
			t.Errorf("%q became %+v", user, who)
		}
		if who.uid == 0 && who.name == "" && strings.Trim(id.user, "0") != "" {
			t.Errorf("%q became root", user)
		}
		if strings.Contains(who.home, "\n") || strings.Contains(who.name, ":") {
			t.Errorf("%q became %+v", user, who)
		}
		if _, err := b.memberships(who.name); err != nil {
			return
		}
	})
}

func FuzzPasswd(f *testing.F) {
	f.Add([]byte(testPasswd))
	f.Add([]byte("a:b:c:d:e:f:g:h\r\n\x00:::\n:::"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for e := range parsePasswd(data) {
			if e.name == "" || strings.ContainsAny(e.name+e.uid+e.gid+e.home, ":\n") {
				t.Errorf("entry %+v", e)
			}
		}
	})
}

func FuzzGroup(f *testing.F) {
	f.Add([]byte(testGroup))
	f.Add([]byte("a:b:c:,,,d\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for e := range parseGroup(data) {
			if e.name == "" || strings.ContainsAny(e.name+e.gid, ":\n") || (e.has("nobody") && !strings.Contains(e.members, "nobody")) {
				t.Errorf("entry %+v", e)
			}
		}
	})
}
