// configdoc writes docs/configuration.md out of the documented structs of
// internal/config and their defaults, so that the page cannot be wrong:
//
//	go run ./test/configdoc >docs/configuration.md
package main

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"

	"cloister.dev/internal/config"
)

func main() {
	page, err := render()
	if err == nil {
		_, err = os.Stdout.Write(page)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "configdoc:", err)
		os.Exit(1)
	}
}

const introduction = `# Configuration

*Made by ` + "`make generate`" + ` out of internal/config; do not edit.*

The daemon reads ` + "`" + config.DefaultPath + "`" + ` and then ` + "`conf.d/*.toml`" + ` beside it in the
order of their names; neither has to exist. With ` + "`--config FILE`" + ` that file is
read instead, which may be containerd's. A file may name others in ` + "`imports`" + `, which
are read after it. Where several files set a key the last one wins; tables are
merged, lists are replaced. ` + "`--root`, `--state`, `--address` and `--log-level`" + ` win over
all files.

Files of containerd's versions 1, 2, 3 and 4 are read, and mean what they mean to
containerd. The page describes version 4. A key that does not exist, or has the
wrong type, is an error that names file, line and the key that was meant. A key
that was dropped acts as before where that has a meaning, with a warning that says
what replaces it; a key that has no effect here is a warning when it is set to
anything but its default.

| command | what it does |
| --- | --- |
| ` + "`cloister config validate [FILE...]`" + ` | checks files, exits with 1 if one would be refused |
| ` + "`cloister config dump`" + ` | the effective values, and the file and line that each comes from |
| ` + "`cloister config migrate FILE`" + ` | what a file sets in the newest form, with a comment at each change |
| ` + "`cloister config explain KEY`" + ` | type, default and meaning of a key, of any version |
| ` + "`cloister config default`" + ` | a file of all defaults |

` + "```toml" + `
version = 4

[cloister]
network = "builtin"

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "crun"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
options = { BinaryName = "/usr/bin/crun" }
` + "```" + `

## Changes while the daemon runs

Keys marked **live** take effect when a file changes, and on SIGHUP (` + "`systemctl reload\ncloister`" + `). A pod keeps the version of its handler that it was started with,
also for containers that are made in it later. Other keys take effect at the next
start of the daemon; its log names those that were changed and wait for it.

Replace a file as a whole (write another one, then rename it) if it is to change
at once: what is half written for longer than a moment is read as it is.

A file that is refused changes nothing: the daemon goes on with what it has, logs
the error, and shows it in the condition ` + "`ConfigurationAccepted`" + ` of the CRI status
(` + "`crictl info`" + `) until the file is right again. Deprecated keys are in the condition
` + "`NoDeprecatedConfiguration`" + `; a CNI file that is not in force in ` + "`NetworkConfigurationAccepted`" + `.
`

// render makes the page.
func render() ([]byte, error) {
	keys, err := config.Reference()
	if err != nil {
		return nil, err
	}
	var w bytes.Buffer
	w.WriteString(introduction)
	var tables []string
	for _, k := range keys {
		if t := table(k); !slices.Contains(tables, t) {
			tables = append(tables, t)
		}
	}
	for _, t := range tables {
		fmt.Fprintf(&w, "\n## %s\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n", t)
		for _, k := range keys {
			if table(k) == t {
				row(&w, k)
			}
		}
	}
	w.WriteString("\n## Keys of older forms\n\nWhat has moved between versions is read without a word. These were dropped, and act where the last column does not say otherwise.\n\n" +
		"| key | instead |\n| --- | --- |\n")
	for _, d := range config.Dropped() {
		fmt.Fprintf(&w, "| `%s` | %s |\n", d.Key, d.Instead)
	}
	return w.Bytes(), nil
}

// table is the heading that a key stands under.
func table(k config.Key) string {
	if k.OptionsOf != "" {
		return "Options of " + k.OptionsOf
	}
	i := strings.LastIndex(k.Key, k.Path[len(k.Path)-1])
	name := strings.Trim(k.Key[:i], `."`)
	if strings.Count(name, `"`)%2 == 1 {
		name += `"`
	}
	if name == "" {
		return "Top level"
	}
	return "[" + name + "]"
}

func row(w *bytes.Buffer, k config.Key) {
	def := ""
	if k.Default != "" {
		def = "`" + strings.ReplaceAll(k.Default, "|", `\|`) + "`"
	}
	meaning := strings.ReplaceAll(k.Meaning, "|", `\|`)
	if k.Idle != "" {
		meaning += ". *No effect: " + k.Idle + "*"
	}
	if k.Live {
		meaning += ". **live**"
	}
	fmt.Fprintf(w, "| `%s` | %s | %s | %s |\n", k.Path[len(k.Path)-1], k.Type, def, meaning)
}
