// cloister-teec loads a vendor's TEE client library and answers the questions
// of the device plugin with it. It is a program of its own because such a
// library may hang, crash or exit, and because loading one takes a dynamic
// linker, which the other programs do without.
package main

import (
	"fmt"
	"os"

	"cloister.dev/internal/tee/teec"
	"cloister.dev/internal/tee/teec/native"
)

func main() {
	if err := teec.Serve(native.Open); err != nil {
		fmt.Fprintln(os.Stderr, "cloister-teec: "+err.Error())
		os.Exit(1)
	}
}
