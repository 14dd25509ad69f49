package image

import (
	"math"
	"strconv"
	"strings"
)

// parseUser splits the USER of an image configuration into a uid or a name.
// Only a plain decimal number that a 32-bit signed id holds is a uid; anything
// else, however numeric it looks, is a name, so that no number can wrap around
// to root and a check for non-root refuses it.
func parseUser(user string) (uid *int64, username string) {
	user, _, _ = strings.Cut(user, ":")
	if user == "" {
		return nil, ""
	}
	if strings.Trim(user, "0123456789") != "" {
		return nil, user
	}
	n, err := strconv.ParseInt(user, 10, 64)
	if err != nil || n > math.MaxInt32 {
		return nil, user
	}
	return &n, ""
}
