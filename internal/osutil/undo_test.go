package osutil

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestUndoRunsNewestFirstAndAll(t *testing.T) {
	var ran []int
	boom, cause := errors.New("boom"), errors.New("cause")
	var u Undo
	for i := range 3 {
		u.Add("step", func(ctx context.Context) error {
			ran = append(ran, i)
			if i == 1 {
				return boom
			}
			return ctx.Err()
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := cause
	u.Run(ctx, &err)
	if !slices.Equal(ran, []int{2, 1, 0}) {
		t.Errorf("steps ran in order %v", ran)
	}
	if !errors.Is(err, cause) || !errors.Is(err, boom) || errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

func TestUndoForgetsAfterSuccess(t *testing.T) {
	var u Undo
	u.Add("step", func(context.Context) error { t.Error("a released step ran"); return nil })
	var none error
	u.Run(t.Context(), &none)
	u.Release()
	failed := errors.New("failed")
	u.Run(t.Context(), &failed)
}
