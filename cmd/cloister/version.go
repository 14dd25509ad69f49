package main

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) versionCommand() *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the versions of this program and of the daemon",
		Example: "  cloister version\n  cloister version -o json",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := map[string]string{"client": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			c, err := a.dial(cmd.Context())
			switch {
			case err == nil:
				defer c.Close()
				r, err := c.Runtime.Version(cmd.Context(), &runtimeapi.VersionRequest{})
				if err != nil {
					return fmt.Errorf("version of the daemon: %w", err)
				}
				v["daemon"] = r.GetRuntimeName() + " " + r.GetRuntimeVersion()
				v["cri"], v["address"] = r.GetRuntimeApiVersion(), c.Address
			case errors.Is(err, client.ErrNoDaemon) && !a.addressSet:
				v["daemon"] = "not running"
			default:
				return err
			}
			if format.Structured() {
				return display.Value(a.stdout, *format, v)
			}
			t := &display.Table{Heading: []string{"WHAT", "VERSION"}}
			for _, k := range []string{"client", "go", "platform", "daemon", "cri", "address"} {
				if v[k] != "" {
					t.Add(k, v[k])
				}
			}
			return t.Write(a.stdout)
		},
	}
	format = outputFlag(cmd)
	return cmd
}
