//go:build race

package hosttest

// raceFlags make the shim under test report data races, too.
var raceFlags = []string{"-race"}
