package display

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

// Format is a value of the flag --output.
type Format string

// The formats; Wide is Table with more columns.
const (
	Plaintext Format = "table"
	Wide      Format = "wide"
	JSON      Format = "json"
	YAML      Format = "yaml"
)

// Formats are all values, for help and completion.
func Formats() []string {
	return []string{string(Plaintext), string(Wide), string(JSON), string(YAML)}
}

// String, Set and Type make Format the value of a flag.
func (f *Format) String() string { return string(*f) }

// Set takes a value of the flag.
func (f *Format) Set(s string) error {
	if !slices.Contains(Formats(), s) {
		return fmt.Errorf("it is one of %s", strings.Join(Formats(), ", "))
	}
	*f = Format(s)
	return nil
}

// Type names the value in help.
func (f *Format) Type() string { return "format" }

// Structured tells whether the format is one for programs.
func (f Format) Structured() bool { return f == JSON || f == YAML }

// Message prints a message of the API as JSON or YAML, fields in the order of
// their names.
func Message(w io.Writer, f Format, m proto.Message) error {
	b, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	return Value(w, f, v)
}

// Value prints anything as JSON or YAML.
func Value(w io.Writer, f Format, v any) error {
	if f == YAML {
		b, err := yaml.Marshal(v)
		if err != nil {
			return fmt.Errorf("encode the answer: %w", err)
		}
		_, err = w.Write(b)
		return err
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// Age tells how long ago a time was, in its largest unit.
func Age(nanos int64, now time.Time) string {
	if nanos <= 0 {
		return ""
	}
	d := now.Sub(time.Unix(0, nanos))
	units := []struct {
		name string
		size time.Duration
	}{{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}}
	for _, u := range units {
		if d >= 2*u.size {
			return fmt.Sprintf("%d%s ago", d/u.size, u.name)
		}
	}
	return fmt.Sprintf("%ds ago", max(d, 0)/time.Second)
}

// Bytes writes a size with three digits and a binary unit.
func Bytes(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1000 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	digits := 0
	if f < 10 {
		digits = 2
	} else if f < 100 {
		digits = 1
	}
	return fmt.Sprintf("%.*f %ciB", digits, f, units[i])
}
