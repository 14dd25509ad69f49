package channel

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
)

func TestDuplexEndsOneDirection(t *testing.T) {
	a, b := net.Pipe()
	x, y := NewDuplex(a), NewDuplex(b)
	defer x.Close()
	defer y.Close()
	question := bytes.Repeat([]byte("question "), 20000) // several portions
	go func() {
		_, _ = x.Write(question)
		_ = x.CloseWrite()
	}()
	got, err := io.ReadAll(y)
	if err != nil || !bytes.Equal(got, question) {
		t.Fatalf("read %d bytes of %d: %v", len(got), len(question), err)
	}
	go func() {
		_, _ = y.Write([]byte("answer"))
		_ = y.CloseWrite()
	}()
	if got, err := io.ReadAll(x); err != nil || string(got) != "answer" {
		t.Fatalf("read %q after the other direction had ended: %v", got, err)
	}
	if _, err := x.Write([]byte("more")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after CloseWrite: %v", err)
	}
}

func TestDuplexTellsACutStream(t *testing.T) {
	for name, sent := range map[string][]byte{
		"before a portion": {},
		"in a length":      {3},
		"in a portion":     {3, 0, 'a'},
	} {
		d := NewDuplex(stream{Reader: bytes.NewReader(sent)})
		if _, err := io.ReadAll(d); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v, want %v", name, err, io.ErrUnexpectedEOF)
		}
	}
}

type stream struct{ io.Reader }

func (stream) Write(b []byte) (int, error) { return len(b), nil }
func (stream) Close() error                { return nil }

func FuzzDuplex(f *testing.F) {
	f.Add([]byte{5, 0, 'h', 'e', 'l', 'l', 'o', 0, 0})
	f.Add([]byte{0xff, 0xff, 1})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, sent []byte) {
		got, err := io.ReadAll(NewDuplex(stream{Reader: bytes.NewReader(sent)}))
		if len(got) > len(sent) {
			t.Fatalf("%d bytes came out of %d", len(got), len(sent))
		}
		if err == nil && !bytes.Contains(sent, []byte{0, 0}) {
			t.Fatal("an end that nobody sent")
		}
	})
}
