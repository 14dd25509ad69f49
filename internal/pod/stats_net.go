package pod

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// iface is what went through a network interface of a pod.
type iface struct {
	name                                    string
	rxBytes, rxPackets, rxErrors, rxDropped uint64
	txBytes, txPackets, txErrors, txDropped uint64
}

const (
	loopback      = "lo"
	mainInterface = "eth0" // what CNI and the built-in network call a pod's first interface
)

// measureNetwork gives the interfaces of the sandbox, none when it is on the
// node's network: that traffic is not the pod's.
func (s *Service) measureNetwork(ctx context.Context, sb *sandbox) ([]iface, error) {
	v := sb.get()
	if v.NetNS == "" {
		return nil, nil
	}
	return s.stats.sandbox(v.ID).net.get(ctx, s.statsPeriod(), func(context.Context, []iface) (ifs []iface, err error) {
		err = inNetNS(v.NetNS, func() error {
			// The thread's view is that of the namespace it is in.
			f, err := os.Open("/proc/thread-self/net/dev")
			if err != nil {
				return err
			}
			defer f.Close()
			ifs, err = parseNetDev(f)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("network counters of pod sandbox %.13s: %w", v.ID, err)
		}
		return ifs, nil
	})
}

// parseNetDev reads /proc/net/dev: two lines of headings, then per interface
// eight numbers received and eight sent.
func parseNetDev(r io.Reader) ([]iface, error) {
	var ifs []iface
	sc := bufio.NewScanner(r)
	for n := 0; sc.Scan(); n++ {
		if n < 2 {
			continue
		}
		name, rest, ok := strings.Cut(sc.Text(), ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 16 {
			return nil, fmt.Errorf("unexpected line %.100q", sc.Text())
		}
		var v [16]uint64
		for i := range v {
			var err error
			if v[i], err = strconv.ParseUint(fields[i], 10, 64); err != nil {
				return nil, fmt.Errorf("unexpected line %.100q: %w", sc.Text(), err)
			}
		}
		ifs = append(ifs, iface{name: strings.TrimSpace(name),
			rxBytes: v[0], rxPackets: v[1], rxErrors: v[2], rxDropped: v[3],
			txBytes: v[8], txPackets: v[9], txErrors: v[10], txDropped: v[11]})
	}
	return ifs, sc.Err()
}

// mainOf gives the index of the pod's main interface, -1 without one.
func mainOf(ifs []iface) int {
	first := -1
	for i, f := range ifs {
		if f.name == mainInterface {
			return i
		}
		if first < 0 && f.name != loopback {
			first = i
		}
	}
	return first
}
