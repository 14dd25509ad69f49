package oci

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The kernel's real-time signals, without the two that libc keeps to itself.
const (
	rtMin = 34
	rtMax = 64
)

// setStopSignal prefers the request's signal to the image's.
func (b *builder) setStopSignal() error {
	field, name := "stop_signal", criSignal(b.in.Config.GetStopSignal())
	if name == "" {
		field, name = "STOPSIGNAL of the image", b.in.Image.StopSignal
	}
	if name == "" {
		b.res.StopSignal = "SIGTERM"
		return nil
	}
	signal, ok := parseSignal(name)
	if !ok {
		return invalid(field, name, `give a signal such as "SIGTERM"; use another image or set stop_signal`)
	}
	b.res.StopSignal = SignalName(signal)
	return nil
}

// criSignal translates SIGNAL_SIGRTMINPLUS1 to SIGRTMIN+1; the default is "".
func criSignal(s runtimeapi.Signal) string {
	if s == runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		return ""
	}
	name := strings.TrimPrefix(s.String(), "SIGNAL_")
	return strings.Replace(strings.Replace(name, "PLUS", "+", 1), "MINUS", "-", 1)
}

// ParseSignal reads a signal's name ("SIGTERM", "term", "SIGRTMIN+3") or
// number.
func ParseSignal(name string) (syscall.Signal, error) {
	s, ok := parseSignal(name)
	if !ok {
		return 0, invalid("signal", name, `give a name such as "SIGTERM" or a number from 1 to 64`)
	}
	return s, nil
}

func parseSignal(name string) (syscall.Signal, bool) {
	if n, err := strconv.Atoi(name); err == nil {
		return syscall.Signal(n), n >= 1 && n <= rtMax && strings.Trim(name, "0123456789") == ""
	}
	name = "SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")
	for prefix, base := range map[string]int{"SIGRTMIN+": rtMin, "SIGRTMAX-": rtMax} {
		digits, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 8)
		if err != nil || n > rtMax-rtMin {
			return 0, false
		}
		if base == rtMax {
			return syscall.Signal(rtMax - int(n)), true
		}
		return syscall.Signal(rtMin + int(n)), true
	}
	// Names that the kernel's table has under another spelling or not at all.
	switch name {
	case "SIGRTMIN":
		return rtMin, true
	case "SIGRTMAX":
		return rtMax, true
	case "SIGCLD":
		return unix.SIGCHLD, true
	case "SIGPOLL":
		return unix.SIGIO, true
	case "SIGIOT":
		return unix.SIGABRT, true
	}
	s := unix.SignalNum(name)
	return s, s != 0
}

// SignalName is the name that ParseSignal reads back and CRI knows.
func SignalName(s syscall.Signal) string {
	const middle = (rtMin + rtMax) / 2
	switch {
	case s == rtMin:
		return "SIGRTMIN"
	case s == rtMax:
		return "SIGRTMAX"
	case s > rtMin && s <= middle:
		return "SIGRTMIN+" + strconv.Itoa(int(s)-rtMin)
	case s > middle && s < rtMax:
		return "SIGRTMAX-" + strconv.Itoa(rtMax-int(s))
	}
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return strconv.Itoa(int(s))
}

// CRISignal is the enum value of a signal's name, for ContainerStatus.
func CRISignal(name string) runtimeapi.Signal {
	key := "SIGNAL_" + strings.Replace(strings.Replace(name, "+", "PLUS", 1), "-", "MINUS", 1)
	return runtimeapi.Signal(runtimeapi.Signal_value[key])
}

func checkSignal(s runtimeapi.Signal) error {
	if _, ok := runtimeapi.Signal_name[int32(s)]; !ok {
		return invalid("stop_signal", int32(s), "give a value of the Signal enumeration")
	}
	// Names that Linux does not have, should the enumeration grow.
	if name := criSignal(s); name != "" {
		if _, ok := parseSignal(name); !ok {
			return invalid("stop_signal", name, "Linux has no such signal")
		}
	}
	return nil
}
