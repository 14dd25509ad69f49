package channel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Duplex is a connection whose directions end separately, on a stream that
// cannot do so. Each portion goes with two bytes of length before it; a length
// of zero is the end of that direction.
type Duplex struct {
	stream io.ReadWriteCloser

	read sync.Mutex // guards left and ended
	left int        // bytes of the current portion that were not read yet
	over bool       // the other side has ended

	write  sync.Mutex // guards closed and serializes portions
	closed bool
}

// maxPortion is the most that goes with one length.
const maxPortion = 32 << 10

// ErrPortion tells of a length that no Duplex writes.
var ErrPortion = errors.New("the other side does not keep to the protocol")

// NewDuplex owns stream.
func NewDuplex(stream io.ReadWriteCloser) *Duplex { return &Duplex{stream: stream} }

// Read is part of io.Reader; io.EOF is the end that the other side gave.
func (d *Duplex) Read(b []byte) (int, error) {
	d.read.Lock()
	defer d.read.Unlock()
	if len(b) == 0 {
		return 0, nil
	}
	if d.over {
		return 0, io.EOF
	}
	if d.left == 0 {
		var head [2]byte
		if _, err := io.ReadFull(d.stream, head[:]); err != nil {
			return 0, cut(err)
		}
		d.left = int(binary.LittleEndian.Uint16(head[:]))
		switch {
		case d.left == 0:
			d.over = true
			return 0, io.EOF
		case d.left > maxPortion:
			return 0, fmt.Errorf("a portion of %d bytes: %w", d.left, ErrPortion)
		}
	}
	n, err := d.stream.Read(b[:min(len(b), d.left)])
	d.left -= n
	if err != nil {
		err = cut(err)
	}
	return n, err
}

// cut makes the end of the stream differ from the end of the connection.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Write is part of io.Writer.
func (d *Duplex) Write(b []byte) (n int, err error) {
	d.write.Lock()
	defer d.write.Unlock()
	if d.closed {
		return 0, io.ErrClosedPipe
	}
	buf := make([]byte, 0, 2+min(len(b), maxPortion))
	for len(b) > 0 {
		part := b[:min(len(b), maxPortion)]
		buf = append(binary.LittleEndian.AppendUint16(buf[:0], uint16(len(part))), part...)
		if _, err := d.stream.Write(buf); err != nil {
			return n, err
		}
		n += len(part)
		b = b[len(part):]
	}
	return n, nil
}

// CloseWrite gives the other side its io.EOF.
func (d *Duplex) CloseWrite() error {
	d.write.Lock()
	defer d.write.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	_, err := d.stream.Write([]byte{0, 0})
	return err
}

// Close ends both directions at once.
func (d *Duplex) Close() error { return d.stream.Close() }

// HalfCloser is a connection that can end its output alone.
type HalfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Join copies both ways until both directions have ended or one has failed,
// and closes both connections.
func Join(a, b HalfCloser) {
	var wg sync.WaitGroup
	one := func(to, from HalfCloser) {
		_, err := io.Copy(to, from)
		if err == nil {
			err = to.CloseWrite()
		}
		if err != nil {
			// The other direction has nobody to talk to.
			_ = a.Close()
			_ = b.Close()
		}
	}
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
	_ = a.Close()
	_ = b.Close()
}
