# `make demo` and `make test` are the two commands; both install what is missing first (.ci/setup).
SHELL := /bin/bash
BIN := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)/release

.PHONY: help setup build peers demo bench test lint fmt bpf bpf-check fuzz clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:
	@.ci/setup

build: setup ## Build every binary into target/release
	cargo build --release --locked --workspace --bins

peers: setup ## Fetch and build the other WireGuard and CNI programs that tests talk to
	.ci/peers

demo: build ## Three encrypted hosts with real packets; KEEP=1 leaves them up to play with
	$(BIN)/mesh-lab demo $(if $(KEEP),--keep)

bench: build ## mesh-datapath beside wireguard-go and others, mesh-agent among a thousand nodes (as root; 45 minutes); BENCH="--quick --only margay,wireguard-go" for less
	cargo build --release --locked --workspace --examples
	.ci/peers bench
	$(BIN)/mesh-lab bench $(BENCH)

test: build peers ## Every test (as root); closes with "N passed, N failed"
	.ci/test

lint: setup ## Formatting, clippy, layers, dependency rules
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	.ci/layers
	.ci/deny

fmt: ## Format the sources
	cargo fmt --all

bpf: setup ## Rebuild the committed BPF object (after a change in ebpf-policy/bpf)
	.ci/bpf build

bpf-check: setup ## Rebuild the BPF object elsewhere and compare it with the committed one
	.ci/bpf check

fuzz: setup ## Every fuzz target for FUZZ_SECONDS (60) each; a finding stops it
	.ci/fuzz $(FUZZ_SECONDS)

clean:
	cargo clean
