//go:build !race

package hosttest

var raceFlags []string
