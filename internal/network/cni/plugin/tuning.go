package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
)

// tuning changes sysctls and attributes of the container's interface, and puts
// the attributes back at the end.
type tuning struct{ *Set }

const (
	tuningDataDir = "/run/cni/tuning"
	allowList     = "/etc/cni/tuning/allowlist.conf"
)

type tuningConf struct {
	types.PluginConf
	tuningKeys
	DataDir       string `json:"dataDir"`
	RuntimeConfig struct {
		Mac string `json:"mac"`
	} `json:"runtimeConfig"`
	Args struct {
		CNI tuningKeys `json:"cni"`
	} `json:"args"`
}

type tuningKeys struct {
	Sysctl   map[string]string `json:"sysctl,omitempty"`
	Mac      string            `json:"mac,omitempty"`
	Promisc  *bool             `json:"promisc,omitempty"`
	MTU      int               `json:"mtu,omitempty"`
	AllMulti *bool             `json:"allmulti,omitempty"`
	TxQLen   *int              `json:"txQLen,omitempty"`
}

func (p tuning) conf(c Call) (tuningConf, *types100.Result, error) {
	conf := tuningConf{DataDir: tuningDataDir}
	prev, err := parse(c, &conf, &conf.PluginConf)
	if err != nil {
		return conf, nil, err
	}
	k, over := &conf.tuningKeys, conf.Args.CNI
	mac, err := macArgs{}.mac(c.Args)
	if err != nil {
		return conf, nil, err
	}
	if mac != nil {
		k.Mac = mac.String()
	}
	for _, m := range []string{conf.RuntimeConfig.Mac, over.Mac} {
		if m != "" {
			k.Mac = m
		}
	}
	if k.Sysctl == nil {
		k.Sysctl = map[string]string{}
	}
	maps.Copy(k.Sysctl, over.Sysctl)
	if over.Promisc != nil {
		k.Promisc = over.Promisc
	}
	if over.MTU != 0 {
		k.MTU = over.MTU
	}
	if over.AllMulti != nil {
		k.AllMulti = over.AllMulti
	}
	if over.TxQLen != nil {
		k.TxQLen = over.TxQLen
	}
	// "promisc": false is the default and means: as it is.
	if k.Promisc != nil && !*k.Promisc {
		k.Promisc = nil
	}
	return conf, prev, nil
}

// tune translates the keys.
func (k tuningKeys) tune(ifName string) (link.Tune, error) {
	t := link.Tune{MTU: k.MTU, Promiscuous: k.Promisc, AllMulti: k.AllMulti, TxQLen: k.TxQLen, Sysctls: map[string]string{}}
	if k.Mac != "" {
		mac, err := net.ParseMAC(k.Mac)
		if err != nil {
			return t, fmt.Errorf("tuning: %w", err)
		}
		t.MAC = mac
	}
	for key, value := range k.Sysctl {
		path, err := sysctlPath(key, ifName)
		if err != nil {
			return t, err
		}
		t.Sysctls[path] = value
	}
	return t, nil
}

// sysctlPath is the file of a key; only those of a network namespace.
func sysctlPath(key, ifName string) (string, error) {
	rel := strings.Replace(strings.ReplaceAll(key, ".", "/"), "IFNAME", ifName, 1)
	path := filepath.Join("/proc/sys", rel)
	if !strings.HasPrefix(path, "/proc/sys/net/") {
		return "", types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("tuning: sysctl %q is not one of the network", key), "")
	}
	return path, nil
}

// allowed checks the keys against the node's list, if there is one.
func allowed(sysctls map[string]string) error {
	data, err := os.ReadFile(allowList)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	var patterns []*regexp.Regexp
	for l := range strings.Lines(string(data)) {
		if l = strings.TrimSpace(l); l == "" {
			continue
		}
		re, err := regexp.Compile(l)
		if err != nil {
			return fmt.Errorf("tuning: %s: %w", allowList, err)
		}
		patterns = append(patterns, re)
	}
	for key := range sysctls {
		if !slices.ContainsFunc(patterns, func(re *regexp.Regexp) bool { return re.MatchString(key) }) {
			return fmt.Errorf("tuning: sysctl %s is not allowed by %s", key, allowList)
		}
	}
	return nil
}

func (p tuning) add(_ context.Context, c Call) (types.Result, error) {
	conf, prev, err := p.conf(c)
	if err != nil {
		return nil, err
	}
	if prev == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "tuning must follow another plugin in the list: there is no prevResult", "")
	}
	if err := allowed(conf.Sysctl); err != nil {
		return nil, err
	}
	t, err := conf.tune(c.IfName)
	if err != nil {
		return nil, err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := p.backup(ns, c, conf); err != nil {
		return nil, err
	}
	if err := t.Apply(ns, c.IfName); err != nil {
		return nil, err
	}
	if t.MAC != nil {
		for _, i := range prev.Interfaces {
			if i.Name == c.IfName {
				i.Mac = t.MAC.String()
			}
		}
	}
	return prev, nil
}

func backupPath(c Call, dir string) string {
	return filepath.Join(dir, c.ContainerID+"_"+c.IfName+".json")
}

// backup writes what the attributes were, in the program's file.
func (p tuning) backup(ns *link.NetNS, c Call, conf tuningConf) error {
	k := conf.tuningKeys
	if k.Mac == "" && k.MTU == 0 && k.Promisc == nil && k.AllMulti == nil && k.TxQLen == nil {
		return nil
	}
	st, err := link.Inspect(ns, c.IfName)
	if err != nil {
		return err
	}
	var was tuningKeys
	if k.Mac != "" {
		was.Mac = st.MAC.String()
	}
	if k.MTU != 0 {
		was.MTU = st.MTU
	}
	if k.Promisc != nil {
		was.Promisc = &st.Promiscuous
	}
	if k.AllMulti != nil {
		was.AllMulti = &st.AllMulti
	}
	if k.TxQLen != nil {
		was.TxQLen = &st.TxQLen
	}
	data, err := json.Marshal(was)
	if err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	if err := os.MkdirAll(conf.DataDir, 0o700); err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	if err := os.WriteFile(backupPath(c, conf.DataDir), data, 0o600); err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	return nil
}

// del puts the attributes back where the interface still is, for plugins that
// hand an interface of the node back; with a pair it is gone or about to be.
func (p tuning) del(_ context.Context, c Call) error {
	conf, _, err := p.conf(c)
	if err != nil {
		return err
	}
	path := backupPath(c, conf.DataDir)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	if err := p.restore(c, data); err != nil {
		p.log.Warn("attributes of an interface not put back", "sandbox", c.ContainerID, "interface", c.IfName, "err", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tuning: %w", err)
	}
	return nil
}

func (p tuning) restore(c Call, data []byte) error {
	var was tuningKeys
	if err := json.Unmarshal(data, &was); err != nil {
		return err
	}
	t, err := was.tune(c.IfName)
	if err != nil {
		return err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := t.Apply(ns, c.IfName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (p tuning) check(_ context.Context, c Call) error {
	conf, _, err := p.conf(c)
	if err != nil {
		return err
	}
	t, err := conf.tune(c.IfName)
	if err != nil {
		return err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	have, err := link.ReadSysctls(ns, slices.Collect(maps.Keys(t.Sysctls)))
	if err != nil {
		return fmt.Errorf("tuning: %w", err)
	}
	for path, want := range t.Sysctls {
		if got := strings.TrimSuffix(have[path], "\n"); got != want {
			return fmt.Errorf("tuning: %s is %q, not %q", path, got, want)
		}
	}
	st, err := link.Inspect(ns, c.IfName)
	if err != nil {
		return err
	}
	for _, d := range []struct {
		what string
		ok   bool
	}{
		{"mac", t.MAC == nil || t.MAC.String() == st.MAC.String()},
		{"mtu", t.MTU == 0 || t.MTU == st.MTU},
		{"promisc", t.Promiscuous == nil || *t.Promiscuous == st.Promiscuous},
		{"allmulti", t.AllMulti == nil || *t.AllMulti == st.AllMulti},
		{"txQLen", t.TxQLen == nil || *t.TxQLen == st.TxQLen},
	} {
		if !d.ok {
			return fmt.Errorf("tuning: %s of %s is not as configured", d.what, c.IfName)
		}
	}
	return nil
}
