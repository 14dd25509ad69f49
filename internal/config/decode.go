package config

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// document is the file's shape. The tables of Config are decoded in place,
// over the values that defaults and earlier files left.
type document struct {
	Version      int           `toml:"version"`
	Root         *string       `toml:"root"`
	State        *string       `toml:"state"`
	Imports      []string      `toml:"imports"`
	GRPC         grpcTable     `toml:"grpc"`
	Debug        debug         `toml:"debug"`
	Plugins      plugins       `toml:"plugins"`
	Cloister     *Cloister     `toml:"cloister"`
	DevicePlugin *DevicePlugin `toml:"device_plugin"`
}

type grpcTable struct {
	Address string `toml:"address"`
}

type debug struct {
	Level  *string `toml:"level"`
	Format *string `toml:"format"`
}

type plugins struct {
	Images    *Images    `toml:"io.containerd.cri.v1.images"`
	Runtime   *Runtime   `toml:"io.containerd.cri.v1.runtime"`
	Streaming *Streaming `toml:"io.containerd.grpc.v1.cri"`
}

// decode lays one file over the configuration and returns its imports.
func (l *loader) decode(path string, data []byte, main bool) ([]string, error) {
	keys, err := scan(path, data)
	if err != nil {
		return nil, err
	}
	if err := checkVersion(path, data, keys, main); err != nil {
		return nil, err
	}
	if err := checkKeys(keys); err != nil {
		return nil, err
	}
	c := &l.config
	doc := document{
		Root: &c.Root, State: &c.State,
		Debug:        debug{&c.LogLevel, &c.LogFormat},
		Plugins:      plugins{&c.Images, &c.Runtime, &c.Streaming},
		Cloister:     &c.Cloister,
		DevicePlugin: &c.DevicePlugin,
	}
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil {
		return nil, decodeError(path, err)
	}
	for _, k := range keys {
		l.where[k.dotted()] = k.place
	}
	if doc.GRPC.Address != "" {
		c.Address, l.addressed = doc.GRPC.Address, true
	}
	return doc.Imports, nil
}

// checkVersion refuses files of another form before their keys are judged. A
// drop-in that names no version has that of the file it belongs to.
func checkVersion(path string, data []byte, keys []key, main bool) error {
	at := place{path, 1}
	set := false
	for _, k := range keys {
		if k.dotted() == "version" {
			at, set = k.place, true
		}
	}
	var v struct {
		Version any `toml:"version"`
	}
	if err := toml.Unmarshal(data, &v); err != nil {
		return decodeError(path, err)
	}
	switch {
	case v.Version == int64(3), !set && !main, !set && len(keys) == 0:
		return nil
	case !set:
		return at.fault("the file names no version; supported now is version 3, so begin it with \"version = 3\"")
	case v.Version == int64(1), v.Version == int64(2):
		return at.fault(fmt.Sprintf("version %v is not supported yet; supported now is version 3 (containerd 2.0's \"containerd config migrate\" writes it)", v.Version))
	case v.Version == int64(4):
		return at.fault("version 4 is not supported yet; supported now is version 3, which has the same CRI tables and [grpc] address for the socket")
	}
	return at.fault(fmt.Sprintf("version %v does not exist; supported now is version 3", v.Version))
}

// decodeError gives an error of the TOML library its place.
func decodeError(path string, err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		row, _ := strict.Errors[0].Position()
		return place{path, row}.fault(fmt.Sprintf("unknown key %s", quoteKey(strict.Errors[0].Key())))
	}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		row, _ := de.Position()
		msg := strings.TrimPrefix(de.Error(), "toml: ")
		if k := de.Key(); len(k) > 0 {
			msg = quoteKey(k) + ": " + msg
		}
		return place{path, row}.fault(msg)
	}
	return fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
}
