package teec

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// The descriptors that the helper is given: it reads questions from one and
// writes answers to the other, so that the library may print what it likes.
const (
	requestFD = 3
	replyFD   = 4
)

// maxLine bounds a question and an answer.
const maxLine = 64 << 10

const opMemory = "memory"

// startedBy is set in the environment of a helper: its descriptors are there.
const startedBy = "CLOISTER_TEEC"

// request is a line to the helper. The first one carries the options.
type request struct {
	Op      string   `json:"op"`
	Options *Options `json:"options,omitempty"`
}

// reply is a line of the helper.
type reply struct {
	Memory *Memory `json:"memory,omitempty"`
	Error  *Error  `json:"error,omitempty"`
}

// helper is a running cloister-teec.
type helper struct {
	cmd     *exec.Cmd
	to      *os.File
	from    *os.File
	replies *bufio.Reader
	said    *words
	done    chan struct{} // closed when the process is gone
	options *Options      // to be sent with the first question
	killed  bool
}

func startHelper(path string, o Options) (*helper, error) {
	theirIn, to, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	from, theirOut, err := os.Pipe()
	if err != nil {
		theirIn.Close()
		to.Close()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	h := &helper{to: to, from: from, replies: bufio.NewReaderSize(from, maxLine), said: &words{}, done: make(chan struct{}), options: &o}
	h.cmd = exec.Command(path)
	h.cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	h.cmd.Stdout, h.cmd.Stderr = h.said, h.said
	h.cmd.Env = append(os.Environ(), startedBy+"=1")
	h.cmd.WaitDelay = time.Second // a library that forked leaves its output open
	err = h.cmd.Start()
	theirIn.Close()
	theirOut.Close()
	if err != nil {
		to.Close()
		from.Close()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	go func() {
		_ = h.cmd.Wait() // how it ended is in its ProcessState
		close(h.done)
	}()
	return h, nil
}

// ask puts a question and waits for the answer.
func (h *helper) ask(ctx context.Context, r request) (reply, error) {
	r.Options, h.options = h.options, nil
	h.said.reset()
	line, err := json.Marshal(r)
	if err != nil {
		return reply{}, err
	}
	type result struct {
		reply reply
		err   error
	}
	got := make(chan result, 1)
	go func() {
		var res result
		if _, err := h.to.Write(append(line, '\n')); err != nil {
			res.err = err
		} else if text, err := h.replies.ReadSlice('\n'); err != nil {
			res.err = err
		} else {
			res.err = json.Unmarshal(text, &res.reply)
		}
		got <- res
	}()
	select {
	case res := <-got:
		if res.err != nil {
			return reply{}, fmt.Errorf("the TEE client library ended its process: %w", errdefs.ErrUnavailable)
		}
		return res.reply, nil
	case <-ctx.Done():
		h.kill()
		<-got // the pipes broke with the process
		return reply{}, fmt.Errorf("the TEE gave no answer in time, its helper was killed: %w", ctx.Err())
	}
}

func (h *helper) ended() bool {
	select {
	case <-h.done:
		return true
	default:
		return false
	}
}

func (h *helper) kill() {
	_ = h.cmd.Process.Kill() // it may have ended by itself
	// A library that forked leaves the pipes open in the child.
	h.to.Close()
	h.from.Close()
}

// endTime bounds the wait for a killed helper. One that waits in the kernel, as
// in a driver that hangs, does not die before that lets it go.
const endTime = 2 * time.Second

// end kills the helper, waits a while until it is gone, and gives its last words.
func (h *helper) end() string {
	if !h.killed {
		h.killed = true
		h.kill()
	}
	select {
	case <-h.done:
	case <-time.After(endTime):
		return "; " + h.stuck()
	}
	last := ""
	if s := h.cmd.ProcessState; s != nil {
		last = " (" + s.String() + ")"
	}
	if said := h.said.String(); said != "" {
		last += ": " + said
	}
	return last
}

func (h *helper) stuck() string {
	return fmt.Sprintf("process %d was killed and does not end, it waits in the kernel", h.cmd.Process.Pid)
}

// words keeps what a program printed since it was asked: the beginning, as a
// crash says at first what happened and then a lot more.
type words struct {
	mu  sync.Mutex
	buf []byte
}

const maxWords = 512

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = append(w.buf, p[:min(len(p), maxWords-len(w.buf))]...)
	return len(p), nil
}

func (w *words) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = w.buf[:0]
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(strings.Fields(string(w.buf)), " ")
}

// Serve answers questions on the descriptors that a Client gave, until the
// client goes. open loads the library; it is called once, with the first question.
func Serve(open func(Options) (func() (Memory, error), error)) error {
	in, out := os.NewFile(requestFD, "requests"), os.NewFile(replyFD, "replies")
	if os.Getenv(startedBy) == "" {
		return errors.New("this program is started by cloister, which gives it its descriptors; it does nothing by itself")
	}
	// A client that went while the library hangs must not leave this process behind.
	return serve(in, out, open, func() { os.Exit(0) })
}

func serve(in io.Reader, out io.Writer, open func(Options) (func() (Memory, error), error), gone func()) error {
	questions, bad := make(chan request), make(chan error, 1)
	go func() {
		defer close(questions)
		lines := bufio.NewReaderSize(in, maxLine)
		for {
			line, err := lines.ReadSlice('\n')
			if errors.Is(err, io.EOF) {
				gone()
				return
			}
			var q request
			if err == nil {
				err = json.Unmarshal(line, &q)
			}
			if err != nil {
				bad <- fmt.Errorf("read a question: %w", err)
				return
			}
			questions <- q
		}
	}()
	answers := json.NewEncoder(out)
	var query func() (Memory, error)
	var options Options
	for q := range questions {
		if q.Options != nil {
			options = *q.Options
		}
		var err error
		if query == nil {
			query, err = open(options) // tried again with the next question
		}
		if err := answers.Encode(answer(query, err)); err != nil {
			return fmt.Errorf("write an answer: %w", err)
		}
	}
	select {
	case err := <-bad:
		return err
	default:
		return nil
	}
}

func answer(query func() (Memory, error), err error) reply {
	var m Memory
	if err == nil {
		m, err = query()
	}
	if err != nil {
		return reply{Error: asError(err)}
	}
	return reply{Memory: &m}
}
