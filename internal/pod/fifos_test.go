package pod

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A shim may open the input after it has said that the process runs. What a
// client sent and closed by then is there, and so is its end.
func TestInputWaitsForItsReader(t *testing.T) {
	for _, text := range []string{"", "a line\n"} {
		f, err := newFifos(filepath.Join(t.TempDir(), "exec", "x"), true, false, false)
		if err != nil {
			t.Fatal(err)
		}
		defer f.close()
		path, _, _ := f.paths()
		if err := f.opened(); err != nil {
			t.Fatal(err)
		}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			f.send(t.Context(), strings.NewReader(text))
		}()
		select {
		case <-sent:
			t.Errorf("%q was sent to nobody", text)
		case <-time.After(50 * time.Millisecond): // it waits
		}
		got := make(chan string, 1)
		go func() {
			in, err := os.Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			defer in.Close()
			b, err := io.ReadAll(in)
			if err != nil {
				t.Error(err)
			}
			got <- string(b)
		}()
		select {
		case b := <-got:
			if b != text {
				t.Errorf("%q came as %q", text, b)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%q: the reader waits for its end", text)
		}
		<-sent
	}
}
