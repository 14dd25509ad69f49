package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client"
)

// Exit codes. Those from 125 on are run's own, as with docker; below them
// run and exec give the code of the command in the container.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitRunFailed   = 125
	exitNotRunnable = 126
	exitNotFound    = 127
	exitInterrupted = 130
)

// codedError carries the exit code that an error means.
type codedError struct {
	code int
	err  error // nil: nothing to say, the code is the message
}

func (e *codedError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

func usage(err error) error {
	if err == nil {
		return nil
	}
	return &codedError{exitUsage, err}
}

// args makes a mistake in the number of arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usage(errors.New(err.Error() + "; see \"" + cmd.CommandPath() + " --help\""))
		}
		return nil
	}
}

// judge turns an error into an exit code and a sentence.
func judge(err error) (int, string) {
	var exit *client.ExitError
	var coded *codedError
	switch {
	case err == nil:
		return 0, ""
	case errors.As(err, &exit):
		return exit.Code, ""
	case errors.As(err, &coded) && coded.err == nil:
		return coded.code, ""
	case errors.As(err, &coded):
		return coded.code, client.Sentence(coded.err)
	case errors.Is(err, context.Canceled):
		return exitInterrupted, "interrupted"
	}
	return exitFailure, client.Sentence(err)
}
