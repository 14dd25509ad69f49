package main

import (
	"fmt"
	"maps"
	"slices"

	"cloister.dev/test/registry/images"
)

func printDigests(set images.Set) error {
	for _, ref := range slices.Sorted(maps.Keys(set)) {
		d, err := set[ref].Digest()
		if err != nil {
			return fmt.Errorf("%s: %w", ref, err)
		}
		fmt.Println(ref, d)
	}
	return nil
}
