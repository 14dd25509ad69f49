# Two commands matter on a fresh Debian machine with Go: make demo, make test.

PREFIX  ?= /usr/local
CACHE   ?= $(CURDIR)/.cache
TOOLS   := $(CACHE)/bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

GO         ?= go
# CGO=1 makes a daemon that is not static, and knows btrfs and PKCS11 tokens.
CGO        ?= 0
GOFLAGS_RELEASE := -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

GOLANGCI_LINT     := v2.15.0
PROTOC_GEN_GO     := v1.36.12
PROTOC_GEN_GRPC   := v1.5.1
PROTOC_GEN_TTRPC  := v1.2.10

# What the tests start; they build their own without it.
export CLOISTER_BIN := $(CURDIR)/bin

.PHONY: all build demo test unit integration conformance conformance-vm lint bench stock fault e2e fuzz race generate install clean help

all: build

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/cloister, bin/cloister-shim, bin/cloister-agent, bin/cloister-teec
	CGO_ENABLED=$(CGO) $(GO) build -tags nri_no_wasm $(GOFLAGS_RELEASE) -o bin/ ./cmd/cloister
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_RELEASE) -o bin/ ./cmd/cloister-teec
	CGO_ENABLED=0 $(GO) build -tags no_grpc $(GOFLAGS_RELEASE) -o bin/ ./cmd/cloister-shim ./cmd/cloister-agent

demo: ## a pod from an image to its removal, on a private daemon, with times
	@test/setup oci vm go
	@$(GO) run ./test/demo

test: ## everything that has to pass: unit, integration (as root), conformance
	@test/setup oci vm cgo iptables registry
	$(MAKE) build lint unit integration demo conformance

unit: build
	$(GO) vet ./...
	$(GO) test -race -timeout 20m ./...
	cd test/registry && $(GO) vet ./... && $(GO) test -race ./...

integration: build ## a real daemon, as root: bad input, restarts, streams, external shims
	@test/setup oci vm registry
	test/integration/run
	test/external/run

conformance: build ## the public CRI validation suite, offline, against a private daemon
	test/conformance/run

conformance-vm: build ## the same with pods in virtual machines; a quarter of an hour where KVM does not work
	@test/setup oci vm
	RUNTIME_HANDLER=vm test/conformance/run

lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT) ## golangci-lint, see .golangci.yml
	$< run ./...
	@set -e; for module in $(dir $(wildcard test/*/go.mod)); do \
	  echo "== $$module"; (cd $$module; $< run ./...); \
	done

$(TOOLS)/golangci-lint-$(GOLANGCI_LINT):
	GOBIN=$(TOOLS) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT)
	mv $(TOOLS)/golangci-lint $@

bench: build ## one table: containerd v2.4.2 and Cloister in the same run
	@test/setup oci vm cgo
	test/bench/run

stock: build ## a stock containerd v2.4.2, built from its module, runs a pod on Cloister's shim
	@test/setup oci vm cgo
	test/external/stock

fault: build ## kill -9 of daemon and shims under load, at any moment; leaks after 500 pods
	@test/setup oci vm
	test/fault/run
	CHAOS_TIME=$${CHAOS_TIME:-40s} test/external/run -run TestChaos

e2e: build ## a Kubernetes control plane and kubelet on this daemon
	@test/setup oci cgo
	test/e2e/run

FUZZTIME ?= 30s
CHAOS_TIME ?= 1m
# Minimizing takes a minute for each new input where coverage is not the same
# twice, as with files.
fuzz: ## every fuzz target for FUZZTIME each
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
	  done; done

race: ## a minute of random restarts of kubelet, device plugin and backend, under the race detector
	CHAOS_TIME=$(CHAOS_TIME) $(GO) test -race -count=1 -v -run TestChaos ./internal/tee/plugin

generate: ## Go code out of api/*.proto, docs/configuration.md out of internal/config
	$(GO) run ./test/configdoc >docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md
	@set -e; for backend in trustzone sgx; do \
	  $(GO) run ./cmd/cloister device-plugin manifest --backend $$backend --test >deploy/device-plugin-$$backend.yaml; \
	done
	@test/setup protoc
	GOBIN=$(TOOLS) $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO)
	GOBIN=$(TOOLS) $(GO) install google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GRPC)
	GOBIN=$(TOOLS) $(GO) install github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc@$(PROTOC_GEN_TTRPC)
	PATH=$(TOOLS):$$PATH protoc -I api -I /usr/include --go_out=. --go_opt=module=cloister.dev \
	  --go-grpc_out=. --go-grpc_opt=module=cloister.dev debug/v1/debug.proto
	PATH=$(TOOLS):$$PATH protoc -I api -I /usr/include --go_out=. --go_opt=module=cloister.dev \
	  --go-ttrpc_out=. --go-ttrpc_opt=module=cloister.dev host/v1/host.proto guest/v1/guest.proto

install: build ## into PREFIX (/usr/local), with the systemd unit and shell completion
	install -D -m 0755 bin/cloister $(DESTDIR)$(PREFIX)/bin/cloister
	install -D -m 0755 bin/cloister-shim $(DESTDIR)$(PREFIX)/bin/cloister-shim
	install -D -m 0755 bin/cloister-agent $(DESTDIR)$(PREFIX)/bin/cloister-agent
	for name in cloister cloister-vm; do ln -sf cloister-shim $(DESTDIR)$(PREFIX)/bin/containerd-shim-$$name-v2; done
	install -D -m 0755 bin/cloister-teec $(DESTDIR)$(PREFIX)/bin/cloister-teec
	install -d $(DESTDIR)/etc/systemd/system $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	sed 's|@PREFIX@|$(PREFIX)|' deploy/cloister.service >$(DESTDIR)/etc/systemd/system/cloister.service
	bin/cloister completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/cloister

clean: ## remove what was built; the download caches stay
	rm -rf bin
