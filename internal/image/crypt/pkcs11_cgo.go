//go:build cgo

package crypt

const hasPKCS11 = true

var errNoPKCS11 error
