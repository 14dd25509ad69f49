package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) podsCommand() *cobra.Command {
	var quiet bool
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "pods",
		Short:   "List pods",
		Example: "  cloister pods\n  cloister pods -o wide",
		Args:    args(cobra.NoArgs),
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			r, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			if err != nil {
				return fmt.Errorf("list pods: %w", err)
			}
			slices.SortFunc(r.Items, func(x, y *runtimeapi.PodSandbox) int { return cmp.Compare(y.CreatedAt, x.CreatedAt) })
			if quiet {
				for _, p := range r.GetItems() {
					fmt.Fprintln(a.stdout, p.GetId())
				}
				return nil
			}
			if format.Structured() {
				return display.Message(a.stdout, *format, r)
			}
			t, err := podTable(ctx, c, r.GetItems(), *format == display.Wide, time.Now())
			if err != nil {
				return err
			}
			return t.Write(a.stdout)
		}),
	}
	format = outputFlag(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	return cmd
}

func podTable(ctx context.Context, c *client.Conn, list []*runtimeapi.PodSandbox, wide bool, now time.Time) (*display.Table, error) {
	t := &display.Table{Heading: []string{"POD", "NAME", "NAMESPACE", "STATE", "CREATED", "HANDLER"}}
	if wide {
		t.Heading = append(t.Heading, "ATTEMPT", "ADDRESSES")
	}
	for _, p := range list {
		m := p.GetMetadata()
		state := strings.ToLower(strings.TrimPrefix(p.GetState().String(), "SANDBOX_"))
		row := []string{client.ShortID(p.GetId()), m.GetName(), m.GetNamespace(), state, display.Age(p.GetCreatedAt(), now), handlerName(p)}
		if wide {
			st, err := c.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.GetId()})
			if status.Code(err) == codes.NotFound {
				continue // removed since it was listed
			}
			if err != nil {
				return nil, fmt.Errorf("status of pod %s: %w", client.ShortID(p.GetId()), err)
			}
			row = append(row, fmt.Sprint(m.GetAttempt()), strings.Join(addresses(st.GetStatus()), ", "))
		}
		t.Add(row...)
	}
	return t, nil
}

// addresses of a pod, the primary first.
func addresses(st *runtimeapi.PodSandboxStatus) []string {
	n := st.GetNetwork()
	var all []string
	if n.GetIp() != "" {
		all = append(all, n.GetIp())
	}
	for _, ip := range n.GetAdditionalIps() {
		all = append(all, ip.GetIp())
	}
	return all
}

func handlerName(p *runtimeapi.PodSandbox) string { return cmp.Or(p.GetRuntimeHandler(), "default") }
