package pod

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// containerd's shim says that a process runs before it has opened its input.
func TestInputWaitsForItsReader(t *testing.T) {
	for _, input := range []string{"", "a line\n", strings.Repeat("0123456789", 100_000)} {
		f, err := newFifos(filepath.Join(t.TempDir(), "exec", "1"), true, false, false)
		if err != nil {
			t.Fatal(err)
		}
		defer f.close()
		path, _, _ := f.paths()
		f.opened()
		fed := make(chan struct{})
		go func() {
			defer close(fed)
			f.feed(t.Context(), strings.NewReader(input))
		}()
		select {
		case <-fed:
			t.Errorf("%d bytes were given to nobody", len(input))
		case <-time.After(50 * time.Millisecond): // it waits
		}
		reader, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		if got, err := io.ReadAll(reader); err != nil || string(got) != input {
			t.Errorf("of %d bytes came %d: %v", len(input), len(got), err)
		}
		<-fed
	}
}
