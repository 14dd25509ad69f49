package image

import (
	"context"
	"io"
	"log/slog"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// forwardLog is the logger that containerd's libraries find in a context.
// Only warnings and errors pass: the finer levels print headers and addresses
// that may carry secrets.
func forwardLog(to *slog.Logger) *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.WarnLevel)
	l.AddHook(slogHook{to})
	return logrus.NewEntry(l)
}

type slogHook struct{ to *slog.Logger }

func (slogHook) Levels() []logrus.Level {
	return []logrus.Level{logrus.WarnLevel, logrus.ErrorLevel, logrus.FatalLevel, logrus.PanicLevel}
}

func (h slogHook) Fire(e *logrus.Entry) error {
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		if err, ok := v.(error); ok {
			v = clean(err.Error())
		}
		attrs = append(attrs, slog.Any(k, v))
	}
	h.to.LogAttrs(context.Background(), slog.LevelWarn, clean(e.Message), attrs...)
	return nil
}
