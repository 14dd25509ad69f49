package tee

import (
	"reflect"
	"time"
)

// advance gives the state after a scan. It is a function of its arguments
// alone; now is when the scan ended.
func advance(old State, found []Resource, ailments []Ailment, scanErr error, recoverAfter int, now time.Time) (State, []Change) {
	next := State{Backend: old.Backend, Checked: now}
	var changes []Change
	if scanErr != nil {
		next.Error = scanErr.Error()
		found = nil
		for _, r := range old.Resources {
			found = append(found, r.Resource)
			ailments = append(ailments, Ailment{r.Name, AllParts, next.Error})
		}
	} else {
		var gone []Ailment
		found, gone = keepVanished(old, found)
		ailments = append(ailments, gone...)
	}
	for _, r := range found {
		rs := ResourceState{Resource: r}
		for _, p := range r.Parts {
			reason := reasonFor(ailments, r.Name, p.Key)
			before, known := healthOf(old, r.Name, p.Key)
			h := step(before, known, p.Key, reason, recoverAfter, now)
			if h.Healthy != before.Healthy || !known {
				changes = append(changes, Change{Resource: r.Name, Part: p.Key, Healthy: h.Healthy, Reason: h.Reason})
			}
			rs.Health = append(rs.Health, h)
		}
		next.Resources = append(next.Resources, rs)
	}
	return next, changes
}

// step moves one part.
func step(h Health, known bool, key, reason string, recoverAfter int, now time.Time) Health {
	switch {
	case reason != "":
		if h.Healthy || !known {
			h.Since = now
		}
		return Health{Part: key, Reason: reason, Since: h.Since}
	case !known:
		return Health{Part: key, Healthy: true, Since: now}
	case h.Healthy:
		return h
	}
	h.good++
	if h.good >= recoverAfter {
		return Health{Part: key, Healthy: true, Since: now}
	}
	return h
}

// keepVanished adds what was known and is not found any more, and says so.
func keepVanished(old State, found []Resource) ([]Resource, []Ailment) {
	const reason = "it is not on the machine any more"
	var gone []Ailment
	for _, was := range old.Resources {
		at := -1
		for n := range found {
			if found[n].Name == was.Name {
				at = n
			}
		}
		if at < 0 {
			found = append(found, was.Resource)
			gone = append(gone, Ailment{was.Name, AllParts, reason})
			continue
		}
		for _, p := range was.Parts {
			if !hasPart(found[at], p.Key) {
				found[at].Parts = append(found[at].Parts, p)
				gone = append(gone, Ailment{was.Name, p.Key, reason})
			}
		}
	}
	return found, gone
}

func hasPart(r Resource, key string) bool {
	for _, p := range r.Parts {
		if p.Key == key {
			return true
		}
	}
	return false
}

func reasonFor(all []Ailment, resource, part string) string {
	for _, a := range all {
		if a.Resource == resource && (a.Part == part || a.Part == AllParts) {
			return a.Reason
		}
	}
	return ""
}

func healthOf(s State, resource, part string) (Health, bool) {
	for _, r := range s.Resources {
		if r.Name != resource {
			continue
		}
		for n, p := range r.Parts {
			if p.Key == part {
				return r.Health[n], true
			}
		}
	}
	return Health{}, false
}

// sameState tells whether nobody has to be told of a difference.
func sameState(a, b State) bool {
	a.Checked, b.Checked = time.Time{}, time.Time{}
	return reflect.DeepEqual(a, b)
}
