package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/image/copy"
	"cloister.dev/internal/image/crypt"
)

const placesHelp = `Images are named oci:FOLDER[:TAG] for an OCI layout on disk, or by their name in
a registry, for which "docker login" gives the credentials. No daemon is needed.`

// cryptFlags are what the three commands share.
type cryptFlags struct {
	keys, providers, platform string
	plainHTTP                 bool
}

func (f *cryptFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.providers, "providers", os.Getenv("OCICRYPT_KEYPROVIDER_CONFIG"), "`file` that lists key providers; also the variable OCICRYPT_KEYPROVIDER_CONFIG")
	cmd.Flags().StringVar(&f.platform, "platform", "", "only the image for this `platform` (os/arch[/variant])")
	cmd.Flags().BoolVar(&f.plainHTTP, "plain-http", false, "speak HTTP with registries")
}

func (f *cryptFlags) addKeys(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&f.keys, "keys", "", "`folder` with private keys "+what)
}

func (f *cryptFlags) node() crypt.Keys { return crypt.Keys{Folder: f.keys, Providers: f.providers} }

// convert copies an image, changing its layers. Files in between are deleted.
func (f *cryptFlags) convert(ctx context.Context, args []string, change func(dir string) copy.Change) error {
	from, err := copy.Parse(args[0], f.plainHTTP)
	if err != nil {
		return err
	}
	to, err := copy.Parse(args[1], f.plainHTTP)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cloister-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	img, err := copy.Load(ctx, from)
	if err != nil {
		return err
	}
	if img, err = copy.Convert(ctx, img, f.platform, change(dir)); err != nil {
		return fmt.Errorf("image %s: %w", from, err)
	}
	return copy.Save(ctx, to, img)
}

func (a *app) imageEncryptCommand() *cobra.Command {
	var f cryptFlags
	var recipients []string
	var layers []int
	cmd := &cobra.Command{
		Use:   "encrypt FROM TO --recipient SCHEME:KEY…",
		Short: "Encrypt the layers of an image",
		Long: `Copies an image and encrypts its layers, so that only the owner of a
recipient's private key can run it. Recipients are

  jwe:FILE            a public key (PEM, DER or JWK)
  pkcs7:FILE          a certificate
  pgp:FILE:NAME       the name or address of a key in an exported key ring
  pkcs11:FILE         a public key of a hardware token
  provider:NAME[:X]   a key provider of the --providers file

` + placesHelp,
		Example: "  cloister image encrypt oci:app:1 registry.example/app:1 --recipient jwe:node.pub",
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := crypt.ParseRecipients(recipients, f.providers)
			if err != nil {
				return usage(err)
			}
			return f.convert(cmd.Context(), args, func(dir string) copy.Change { return copy.Encrypt(r, layers, dir) })
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVarP(&recipients, "recipient", "r", nil, "whose key opens the image; may be given several times")
	cmd.Flags().IntSliceVar(&layers, "layer", nil, "encrypt only these layers, the first is 0 and the last -1")
	return cmd
}

func (a *app) imageDecryptCommand() *cobra.Command {
	var f cryptFlags
	cmd := &cobra.Command{
		Use:     "decrypt FROM TO --keys FOLDER",
		Short:   "Decrypt the layers of an image",
		Long:    "Copies an image and decrypts its layers with the keys of a folder or with key\nproviders.\n\n" + placesHelp,
		Example: "  cloister image decrypt registry.example/app:1 oci:app:1 --keys /etc/containerd/ocicrypt/keys",
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.convert(cmd.Context(), args, func(dir string) copy.Change { return copy.Decrypt(f.node(), dir) })
		},
	}
	f.add(cmd)
	f.addKeys(cmd, "that open the image")
	return cmd
}

func (a *app) imageInspectCommand() *cobra.Command {
	var f cryptFlags
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "inspect IMAGE",
		Short:   "List the layers of an image, and whose keys open them",
		Long:    "Lists the layers of an image that is in a registry or on disk. With --keys it\ntells which of the encrypted ones the keys open.\n\n" + placesHelp,
		Example: "  cloister image inspect registry.example/app:1 --keys /etc/containerd/ocicrypt/keys",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := copy.Parse(args[0], f.plainHTTP)
			if err != nil {
				return err
			}
			img, err := copy.Load(cmd.Context(), from)
			if err != nil {
				return err
			}
			var keys *crypt.Keys
			if f.keys != "" || f.providers != "" {
				k := f.node()
				keys = &k
			}
			list, err := copy.Inspect(cmd.Context(), img, keys)
			if err != nil {
				return fmt.Errorf("image %s: %w", from, err)
			}
			if format.Structured() {
				return display.Value(a.stdout, *format, list)
			}
			return layerTable(list, *format == display.Wide).Write(a.stdout)
		},
	}
	f.add(cmd)
	f.addKeys(cmd, "to try")
	format = outputFlag(cmd)
	return cmd
}

func layerTable(list []copy.LayerInfo, wide bool) *display.Table {
	t := &display.Table{Heading: []string{"PLATFORM", "LAYER", "SIZE", "ENCRYPTED", "OPENS"}}
	if wide {
		t.Heading = append(t.Heading, "TYPE", "DIGEST")
	}
	for i, l := range list {
		how := "no"
		if l.Encrypted {
			how = strings.Join(l.Schemes, ",")
		}
		row := []string{orDash(l.Platform), fmt.Sprint(i), display.Bytes(uint64(l.Size)), how, orDash(l.Opens)}
		if wide {
			row = append(row, l.MediaType, l.Digest)
		}
		t.Add(row...)
	}
	return t
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
