// Package osutil holds the few things that Cloister needs of the operating
// system and the standard library lacks. It is a leaf: it imports nothing of
// the project.
package osutil

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Undo is the list of steps that take a half-made thing down again, newest
// first. A creation adds a step right after each act, and calls Release when
// the whole is made.
//
//	var undo osutil.Undo
//	defer undo.Run(ctx, &err)
type Undo struct {
	steps []undoStep
}

type undoStep struct {
	what string
	do   func(context.Context) error
}

const (
	// undoTime bounds the whole list: the caller's context may be dead by then.
	undoTime = 30 * time.Second
	// hurryTime is what is left of it once the caller has been told to end.
	hurryTime = 2 * time.Second
)

// UndoContext is what a clean-up runs on when ctx may be why it is needed: it
// outlives ctx's deadline for long, but its cancellation only for a moment,
// for who cancels wants to end and has the clean-up finished later.
func UndoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			time.AfterFunc(hurryTime, cancel)
		}
	})
	return undo, func() { stop(); cancel() }
}

// Add appends a step; what names it in errors ("unmount shm").
func (u *Undo) Add(what string, do func(context.Context) error) {
	u.steps = append(u.steps, undoStep{what, do})
}

// Release forgets all steps: the thing is made.
func (u *Undo) Release() { u.steps = nil }

// Run executes the steps when *err is set, and joins their errors to it.
func (u *Undo) Run(ctx context.Context, err *error) {
	if *err != nil {
		*err = errors.Join(*err, u.All(ctx))
	}
}

// All executes the steps on an UndoContext, newest first, and joins their
// errors. All steps run, whatever fails.
func (u *Undo) All(ctx context.Context) error {
	ctx, cancel := UndoContext(ctx)
	defer cancel()
	var errs []error
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i].do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo: %s: %w", u.steps[i].what, err))
		}
	}
	u.steps = nil
	return errors.Join(errs...)
}
