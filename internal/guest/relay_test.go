package guest

import "testing"

// The buffer grows with a writer of much and shrinks again after it.
func TestFitting(t *testing.T) {
	buf := make([]byte, portion)
	for _, step := range []struct{ read, want int }{
		{10, portion}, {portion, burst}, {burst, burst}, {portion, burst}, {burst - 1, burst},
		{portion - 1, portion}, {0, portion}, {portion, burst}, {0, portion},
	} {
		if buf = fitting(buf, step.read); len(buf) != step.want {
			t.Fatalf("after a read of %d the buffer has %d, want %d", step.read, len(buf), step.want)
		}
	}
}
