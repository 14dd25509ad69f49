package inflate

import "math/bits"

// entry tells what the next bits mean:
//
//	bits 0-4    the bits of the code
//	bits 5-8    extra bits after it; in a link, the bits of the table it links to
//	bit  9      a literal
//	bit  10     neither literal nor match: see below
//	bits 11-12  with bit 10, a link to another table, or the end of the block
//	bits 13-31  the literal, the base of a length or distance, or the table's place
type entry = uint32

const (
	lenMask    = 0x1f
	extraShift = 5
	extraMask  = 0xf
	isLiteral  = 1 << 9
	isSpecial  = 1 << 10
	isSub      = isSpecial | 1<<11
	isEnd      = isSpecial | 1<<12
	valueShift = 13
	valueMask  = 1<<19 - 1

	// Codes of up to so many bits are found at once; longer ones through a link.
	litBits  = 11
	distBits = 8
	litMask  = 1<<litBits - 1
	distMask = 1<<distBits - 1

	maxCode = 15
	numLit  = 288
	numDist = 32
	// The most entries that codes of 15 bits can need: those of the first table,
	// and for each longer code as many as a table of it has.
	litTable  = 1<<litBits + numLit*(1<<(maxCode-litBits))
	distTable = 1<<distBits + numDist*(1<<(maxCode-distBits))
	// invalid stands where no code is.
	invalid = isSpecial
)

// litEntry and distEntry are what symbols mean, without the bits of their code.
func litEntry(symbol int) entry {
	switch {
	case symbol < 256:
		return entry(symbol)<<valueShift | isLiteral
	case symbol == 256:
		return isEnd
	case symbol < 265:
		return entry(symbol-254) << valueShift
	case symbol < 285:
		extra := (symbol - 261) / 4
		base := 3 + (4+(symbol-265)%4)<<extra
		return entry(base)<<valueShift | entry(extra)<<extraShift
	case symbol == 285:
		return 258 << valueShift
	}
	return invalid
}

func distEntry(symbol int) entry {
	switch {
	case symbol < 4:
		return entry(symbol+1) << valueShift
	case symbol < 30:
		extra := (symbol - 2) / 2
		base := 1 + (2+symbol%2)<<extra
		return entry(base)<<valueShift | entry(extra)<<extraShift
	}
	return invalid
}

// build fills a table out of the lengths of codes. It refuses the same sets as
// compress/flate does: those that say too much, and those that say too little,
// but for a single code of one bit and for none at all.
func build(table []entry, primary uint, lengths []uint8, meaning func(int) entry) bool {
	var count, next [maxCode + 2]int
	longest := 0
	for _, n := range lengths {
		count[n]++
		longest = max(longest, int(n))
	}
	for i := range table[:1<<primary] {
		table[i] = invalid
	}
	if longest == 0 {
		return true
	}
	count[0] = 0
	code := 0
	for n := 1; n <= longest; n++ {
		code <<= 1
		next[n] = code
		code += count[n]
	}
	if code != 1<<longest && (code != 1 || longest != 1) {
		return false
	}
	free := 1 << primary // where the next table begins
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		length := uint(n)
		reversed := int(bits.Reverse16(uint16(next[n])) >> (16 - length))
		next[n]++
		e := meaning(symbol) | entry(length)
		if length <= primary {
			for i := reversed; i < 1<<primary; i += 1 << length {
				table[i] = e
			}
			continue
		}
		link := &table[reversed&(1<<primary-1)]
		wide := uint(longest) - primary
		if *link&isSub != isSub {
			*link = isSub | entry(wide)<<extraShift | entry(free)<<valueShift
			for i := range 1 << wide {
				table[free+i] = invalid
			}
			free += 1 << wide
		}
		at := int(*link >> valueShift)
		for i := reversed >> primary; i < 1<<wide; i += 1 << (length - primary) {
			table[at+i] = e
		}
	}
	return true
}

// fixed sets the codes that every decoder knows.
func (d *Reader) fixed() {
	var l [numLit]uint8
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	build(d.lit[:], litBits, l[:], litEntry)
	var dist [numDist]uint8
	for i := range dist {
		dist[i] = 5
	}
	build(d.dist[:], distBits, dist[:], distEntry)
}

// dynamic reads the codes of a block.
func (d *Reader) dynamic() error {
	h, err := d.take(14)
	if err != nil {
		return err
	}
	lits, dists, clens := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if lits > 286 || dists > 30 {
		return ErrCorrupt
	}
	var lengths [numLit + numDist]uint8
	if err := d.lengths(lengths[:lits+dists], clens); err != nil {
		return err
	}
	if !build(d.lit[:], litBits, lengths[:lits], litEntry) || !build(d.dist[:], distBits, lengths[lits:lits+dists], distEntry) {
		return ErrCorrupt
	}
	return nil
}

// lengths reads the lengths of codes, which are in a code of their own.
func (d *Reader) lengths(lengths []uint8, clens int) error {
	const clenBits = 7
	var order = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
	var codes [19]uint8
	for _, at := range order[:clens] {
		n, err := d.take(3)
		if err != nil {
			return err
		}
		codes[at] = uint8(n)
	}
	var table [1 << clenBits]entry
	if !build(table[:], clenBits, codes[:], func(s int) entry { return entry(s) << valueShift }) {
		return ErrCorrupt
	}
	for i := 0; i < len(lengths); {
		if d.nbits < clenBits {
			if err := d.refill(); err != nil {
				return err
			}
		}
		e := table[d.bits&(1<<clenBits-1)]
		if e == invalid {
			return d.orCut(ErrCorrupt)
		}
		if _, err := d.take(uint(e & lenMask)); err != nil {
			return err
		}
		symbol := e >> valueShift
		if symbol < 16 {
			lengths[i] = uint8(symbol)
			i++
			continue
		}
		n, value, err := d.run(symbol, lengths[:i])
		if err != nil {
			return err
		}
		if i+n > len(lengths) {
			return ErrCorrupt
		}
		for range n {
			lengths[i] = value
			i++
		}
	}
	return nil
}

// run reads how often a length repeats, the one before or none.
func (d *Reader) run(symbol uint32, before []uint8) (n int, value uint8, err error) {
	bits, base := uint(2), uint32(3)
	switch {
	case symbol == 17:
		bits = 3
	case symbol == 18:
		bits, base = 7, 11
	}
	more, err := d.take(bits)
	if err != nil {
		return 0, 0, err
	}
	if symbol == 16 {
		if len(before) == 0 {
			return 0, 0, ErrCorrupt
		}
		value = before[len(before)-1]
	}
	return int(more + base), value, nil
}
