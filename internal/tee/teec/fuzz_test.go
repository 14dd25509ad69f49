package teec

import (
	"bytes"
	"encoding/json"
	"testing"
)

// Whatever comes in, the helper answers whole lines or ends.
func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"op":"memory","options":{"UUID":"x"}}` + "\n" + `{"op":"memory"}` + "\n"))
	f.Add([]byte("{}\n\n[]"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		open := func(o Options) (func() (Memory, error), error) {
			if err := o.Check(); err != nil {
				return nil, err
			}
			return func() (Memory, error) { return Memory{TotalKiB: 2, FreeKiB: 1}, nil }, nil
		}
		_ = serve(bytes.NewReader(in), &out, open, func() {}) // nonsense may end it
		for line := range bytes.Lines(out.Bytes()) {
			var r reply
			if err := json.Unmarshal(line, &r); err != nil || (r.Memory == nil) == (r.Error == nil) {
				t.Errorf("%q: %v", line, err)
			}
		}
	})
}
