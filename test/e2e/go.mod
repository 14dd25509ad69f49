module cloister.dev/test/e2e

go 1.26.0

require (
	cloister.dev/test/testnode v0.0.0
	github.com/vishvananda/netlink v1.3.1
)

replace cloister.dev/test/testnode => ../testnode
