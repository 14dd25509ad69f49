package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// budget is one promise: a bound on the ratio to containerd, or on the value.
type budget struct {
	ratio float64
	value float64 // in the row's unit: ms or MB
}

// row is one line: a value per subject, and its bounds by subject.
type row struct {
	name    string
	unit    string
	values  map[string][]float64 // p50 and p95, or the one value
	budgets map[string]budget
}

// table prints everything and reports whether every budget is met.
func table(out io.Writer, set settings, results map[string]*result) bool {
	rows := slices.Concat(timeRows(results), memoryRows(set, results), peakRows(results))
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "operation\t")
	for _, s := range set.Subjects {
		fmt.Fprintf(w, "%s p50\tp95\t", s)
		if s != containerd {
			fmt.Fprint(w, "ratio\t")
		}
	}
	fmt.Fprintln(w, "budget\tmet\t")
	all := true
	for _, r := range rows {
		line, met := r.render(set.Subjects)
		fmt.Fprintln(w, line)
		all = all && met
	}
	w.Flush()
	fmt.Fprintf(out, "\ntimes in ms, memory in MB (proportional set size of daemon and shims); ratio is p50 against containerd's.\n"+
		"containerd v2.4.2 and runc v1.5.2 built from their modules; %d pods, %d containers, %d images in %d turns;\n"+
		"lists with %d containers created, not started; %d pulls of each large image, each into an empty store; their peak\n"+
		"memory is the daemon's greatest resident size; state folders in memory, as /run is.\n", set.Pods, set.Containers, set.Images, set.Rounds, set.List, set.Pulls)
	return all
}

func (r row) render(subjects []string) (line string, met bool) {
	met = true
	var cells, budgets, verdicts []string
	base := r.values[containerd]
	for _, s := range subjects {
		v := r.values[s]
		cells = append(cells, cell(v, 0), cell(v, 1))
		ratio := 0.0
		if s != containerd {
			text := "-"
			if len(v) > 0 && len(base) > 0 && base[0] > 0 {
				ratio = v[0] / base[0]
				text = fmt.Sprintf("%.2f", ratio)
			}
			cells = append(cells, text)
		}
		b, bound := r.budgets[s]
		if !bound {
			continue
		}
		ok := len(v) > 0
		if b.ratio > 0 {
			budgets = append(budgets, fmt.Sprintf("<= %.2f", b.ratio))
			ok = ok && ratio > 0 && ratio <= b.ratio
		} else {
			budgets = append(budgets, fmt.Sprintf("<= %.4g %s", b.value, r.unit))
			ok = ok && v[0] <= b.value
		}
		switch {
		case len(v) == 0:
			verdicts = append(verdicts, "not measured")
		case ok:
			verdicts = append(verdicts, "yes")
		default:
			verdicts = append(verdicts, "NO")
		}
		met = met && (ok || len(v) == 0)
	}
	return fmt.Sprintf("%s\t%s\t%s\t%s\t", r.name, strings.Join(cells, "\t"),
		strings.Join(budgets, " / "), strings.Join(verdicts, " / ")), met
}

func cell(v []float64, i int) string {
	if i >= len(v) {
		return "-"
	}
	if v[i] >= 100 {
		return fmt.Sprintf("%.0f", v[i])
	}
	return fmt.Sprintf("%.2f", v[i])
}

// timeRows are the operations in the order in which a pod lives, the suite's
// first, then our own, then several at once.
func timeRows(results map[string]*result) []row {
	bounds := map[string]map[string]budget{}
	for op, ratios := range map[string][2]float64{
		"critest: pod create": {0.25, 0.25}, "pod create": {0.25, 0.25},
		"pod stop + remove":        {0.25, 0.25},
		"container create + start": {0.6, 0.4},
	} {
		bounds[op] = map[string]budget{cloister: {ratio: ratios[0]}, cloisterCrun: {ratio: ratios[1]}}
	}
	for _, i := range bulkImages {
		bounds[i.name] = map[string]budget{cloister: {ratio: 0.7}}
	}
	for _, op := range []string{"ListContainers", "ListPodSandbox"} {
		bounds[op] = map[string]budget{cloister: {value: 5}}
	}
	var names []string
	for _, r := range results {
		for n := range r.Samples {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if c := rank(a) - rank(b); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	var rows []row
	for _, n := range names {
		r := row{name: n, unit: "ms", values: make(map[string][]float64), budgets: bounds[n]}
		for s, res := range results {
			if d := res.Samples[n]; len(d) > 0 {
				r.values[s] = []float64{milliseconds(quantile(d, 0.5)), milliseconds(quantile(d, 0.95))}
			}
		}
		rows = append(rows, r)
	}
	return rows
}

func rank(name string) int {
	r := 0
	for i, part := range []string{"pod create", "pod status", "pod stop", "pod remove", "pod stop + remove",
		"container create", "container start", "container create + start", "container status", "container stop", "container remove", "image"} {
		if strings.Contains(name, part) {
			r = i + 1
		}
	}
	switch {
	case strings.HasPrefix(name, "critest: "):
	case strings.HasPrefix(name, "List"):
		r += 300
	case strings.HasPrefix(name, "pull "):
		r += 400
	case strings.HasSuffix(name, "at once"):
		r += 200
	default:
		r += 100
	}
	return r
}

func memoryRows(set settings, results map[string]*result) []row {
	all, half := set.Memory, set.Memory/2
	none := row{name: "memory, no pod", unit: "MB", values: map[string][]float64{}}
	full := row{name: fmt.Sprintf("memory, %d pods", all), unit: "MB", values: map[string][]float64{},
		budgets: map[string]budget{cloister: {ratio: 0.35}, cloisterCrun: {ratio: 0.35}}}
	further := row{name: "memory, each further pod", unit: "MB", values: map[string][]float64{},
		budgets: map[string]budget{cloister: {value: 0.5}, cloisterCrun: {value: 0.5}}}
	for s, r := range results {
		if len(r.PSS) < 3 {
			continue
		}
		none.values[s] = []float64{megabytes(r.PSS[0])}
		full.values[s] = []float64{megabytes(r.PSS[all])}
		further.values[s] = []float64{megabytes(r.PSS[all]-r.PSS[half]) / float64(all-half)}
	}
	if len(none.values) == 0 {
		return nil // BENCH_ONLY
	}
	return []row{none, full, further}
}

func megabytes(b int64) float64            { return float64(b) / 1e6 }
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile is the value at q of the sorted samples, the nearest rank.
func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
