//go:build !cgo

package crypt

import "errors"

const hasPKCS11 = false

// errNoPKCS11 is what a static daemon says: the module of a hardware token is
// a shared library.
var errNoPKCS11 = errors.New("this program was built without cgo and cannot load PKCS11 modules; build it by make build CGO=1, or use a key provider")
