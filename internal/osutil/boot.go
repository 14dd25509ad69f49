package osutil

import (
	"fmt"
	"os"
	"strings"
)

// BootID tells one boot of the machine from the next
// (/proc/sys/kernel/random/boot_id, random(4)).
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}
