// Package stdio owns the streams of containers: it reads their output, writes
// it to a log in CRI's format, copies it to attached clients, and feeds stdin.
//
// # What it promises
//
// Every byte that a container wrote is in the log exactly once, even when this
// process is killed (SIGKILL) at any instant and another one takes over; no
// log entry is ever torn. An attached client, however slow, delays neither the
// container nor the log. A log that cannot be written for a while delays the
// container; after a bounded time output is thrown away instead, and the log
// says how much.
//
// # How a byte travels
//
// The container writes to a pipe: a FIFO that it holds open for reading too,
// so that it never meets EPIPE while nobody reads. What is not in the log yet
// is in that pipe, and only there; this package keeps no text in memory but
// for clients. One step of a Stream is
//
//  1. tee(2) the pipe into a scratch pipe and read the copy;
//  2. cut it into log entries; an unfinished last line stays in the pipe until
//     its end arrives, the line grows too long, or the pipe is full;
//  3. under the log's lock: note in the Mark (a page of a file mapped
//     MAP_SHARED, which survives SIGKILL) the log's inode and size and that n
//     bytes are being moved; write the entries with one write; drain the n
//     bytes from the pipe; take the note away.
//
// The one question after a kill is whether the n bytes were drained. The drain
// is a single readv whose last byte goes into the Mark itself, over a witness
// that was set to something else before. Reading from a pipe that holds
// enough bytes does not sleep, so a signal cannot cut it in two.
//
//	killed                     found                        done by Recover
//	before the note            nothing noted                nothing: all in the pipe
//	note made, not written     noted, witness unchanged     cut the log to the noted size (no change)
//	written, not drained       noted, witness unchanged     cut the log to the noted size
//	drained                    noted, witness overwritten   nothing: all in the log
//	note gone                  nothing noted                nothing
//
// After a cut the bytes are still in the pipe and are written again. Entries
// have a fixed-width head, so a reader that had already seen the first writing
// finds every line at the same offset. The log may have been renamed between
// (rotation): Recover finds it by its inode in the same folder.
//
// A terminal cannot be teed. Its output is first moved with splice(2) into a
// pipe of ours, the same way as above then leads to the log; that pipe and the
// terminal have no name, so a second process must hold them (see Hold).
//
// Lock order: Log.mu is taken with no other lock held, Fanout.mu likewise;
// sink.mu may be taken with Fanout.mu held.
package stdio
