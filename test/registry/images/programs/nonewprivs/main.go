// nnp prints its effective user. Its image holds it with the setuid bit, so
// that what it prints tells whether no_new_privs was in force.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Printf("Effective uid: %d\n", os.Geteuid()) }
