package inflate

import (
	"hash/crc32"
	"io"
)

// Flags of a gzip header.
const (
	flagSum     = 1 << 1
	flagExtra   = 1 << 2
	flagName    = 1 << 3
	flagComment = 1 << 4

	maxHeaderText = 512 // as compress/gzip has it
)

// header reads what comes before a member. io.EOF is the stream's end.
func (d *Reader) header() error {
	if err := d.more(); err != nil {
		return err
	}
	if d.srcDone && d.pos >= d.n {
		return io.EOF
	}
	var sum uint32
	next := func() (byte, error) {
		if err := d.more(); err != nil {
			return 0, err
		}
		if d.pos >= d.n {
			return 0, io.ErrUnexpectedEOF
		}
		b := d.in[d.pos]
		d.pos++
		sum = crc32.Update(sum, crc32.IEEETable, []byte{b})
		return b, nil
	}
	var head [10]byte
	for i := range head {
		var err error
		if head[i], err = next(); err != nil {
			return err
		}
	}
	if head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 {
		return ErrCorrupt
	}
	if err := skipFields(head[3], next); err != nil {
		return err
	}
	if head[3]&flagSum != 0 {
		want := uint16(sum)
		a, err := next()
		if err != nil {
			return err
		}
		b, err := next()
		if err != nil {
			return err
		}
		if uint16(a)|uint16(b)<<8 != want {
			return ErrCorrupt
		}
	}
	d.sum, d.size, d.oldest, d.last, d.state = 0, 0, d.w, false, atBlock
	return nil
}

func skipFields(flags byte, next func() (byte, error)) error {
	if flags&flagExtra != 0 {
		a, err := next()
		if err != nil {
			return err
		}
		b, err := next()
		if err != nil {
			return err
		}
		for range int(a) | int(b)<<8 {
			if _, err := next(); err != nil {
				return err
			}
		}
	}
	for _, f := range []byte{flagName, flagComment} {
		if flags&f == 0 {
			continue
		}
		for n := 0; ; n++ {
			b, err := next()
			if err != nil {
				return err
			}
			if b == 0 {
				break
			}
			if n >= maxHeaderText-1 {
				return ErrCorrupt
			}
		}
	}
	return nil
}

// trailer compares the sums of a member with what was made of it.
func (d *Reader) trailer() error {
	d.align()
	var v [2]uint32
	for i := range v {
		var err error
		if v[i], err = d.take(32); err != nil {
			return err
		}
	}
	d.align()
	if v[0] != d.sum || v[1] != d.size {
		return ErrCorrupt
	}
	d.state = atHeader
	return nil
}
