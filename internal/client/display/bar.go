package display

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	debugv1 "cloister.dev/api/debug/v1"
)

// Bar shows one pull on one line: drawn over and over on a terminal, and as a
// beginning and an end elsewhere. It is safe for concurrent use.
type Bar struct {
	w     io.Writer
	image string
	live  bool
	start time.Time

	mu    sync.Mutex
	drawn bool
}

const barWidth = 24

// NewBar begins the display of a pull. live means that w is a terminal.
func NewBar(w io.Writer, image string, live bool) *Bar {
	b := &Bar{w: w, image: Plain(image), live: live, start: time.Now()}
	if !live {
		fmt.Fprintf(w, "pulling %s\n", b.image)
	}
	return b
}

// Update draws the state of the layers. Wrapping is off meanwhile, so that a
// line that is too long stays one line.
func (b *Bar) Update(layers []*debugv1.Layer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.live || len(layers) == 0 {
		return
	}
	b.drawn = true
	fmt.Fprintf(b.w, "\r\033[K\033[?7l%s\033[?7h", b.line(layers, time.Since(b.start)))
}

func (b *Bar) line(layers []*debugv1.Layer, took time.Duration) string {
	var have, total int64
	var ready, fetched int
	for _, l := range layers {
		have += l.GetOffset()
		total += max(l.GetTotal(), l.GetOffset())
		if l.GetState() == debugv1.Layer_DONE {
			ready++
		}
		if l.GetState() >= debugv1.Layer_DOWNLOADED {
			fetched++
		}
	}
	part := 0.0
	if total > 0 {
		part = float64(have) / float64(total)
	} else if fetched == len(layers) {
		part = 1
	}
	full := int(part * barWidth)
	bar := strings.Repeat("█", full) + strings.Repeat("░", barWidth-full)
	text := fmt.Sprintf("%s  %s  %s of %s  %d/%d layers", b.image, bar, Bytes(uint64(have)), Bytes(uint64(total)), ready, len(layers))
	if s := took.Seconds(); fetched == len(layers) {
		text += "  unpacking"
	} else if s > 0.5 {
		text += fmt.Sprintf("  %s/s", Bytes(uint64(float64(have)/s)))
	}
	return text
}

// Done ends the display. The error, if any, is for the caller to show.
func (b *Bar) Done(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.drawn {
		fmt.Fprint(b.w, "\r\033[K")
	}
	if err == nil {
		fmt.Fprintf(b.w, "pulled %s in %.1fs\n", b.image, time.Since(b.start).Seconds())
	}
}
