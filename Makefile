# Two commands: `make run` builds and serves, `make test` installs what it needs and passes everything.
.PHONY: run build demo bench test test-long lint contract console console-format screenshots clients check-deploy deb image clean-venv

CARGO ?= cargo
BINARY := target/release/kiss-vdb
VENV := target/venv
NODE_DIR := target/node
PRETTIER := --print-width 140 --single-quote

run:
	$(CARGO) run --release --locked -- serve

build:
	$(CARGO) build --release --locked

demo: build
	$(BINARY) demo

bench: build
	$(BINARY) bench

# A Debian package, in target/debian.
deb: build
	command -v cargo-deb >/dev/null || $(CARGO) install --locked cargo-deb
	$(CARGO) deb --no-build

# The image, by what answers. podman and buildah keep a health check in docker's format alone, and want to be told what the
# build does not read.
image:
	@for tool in docker podman buildah none; do $$tool info >/dev/null 2>&1 && break; done; \
	test $$tool != none || { echo "no docker, podman or buildah answers"; exit 1; }; \
	ignore=; test $$tool = docker || ignore="--ignorefile deploy/Dockerfile.dockerignore"; \
	BUILDAH_FORMAT=docker $$tool build $$ignore -f deploy/Dockerfile -t kiss-vdb .

# Everything, from a clean checkout on a bare Debian machine with Rust: unit, HTTP, streams, recovery, model and demo
# tests, then the published contract against the server, the console in a browser, other people's clients, and deploy/.
test: build
	command -v fiu-run >/dev/null || (apt-get update && apt-get install -y --no-install-recommends fiu-utils) || echo "no fiu-run: its test is skipped"
	$(CARGO) test --locked --no-fail-fast --features lab
	$(MAKE) contract console clients check-deploy

# Longer runs of what is random: hundreds of kills, many more power cuts and failing disks, thousands of histories. Then
# KISS_SOAK_MINUTES (30) of load that must not grow.
test-long: build
	KISS_KILL_ROUNDS=200 $(CARGO) test --locked --test recovery --test histories -- --nocapture
	KISS_LONG=1 $(CARGO) test --locked --test hostile -- --nocapture
	KISS_LAB_SEEDS=20 $(CARGO) test --release --locked --lib -- lab:: --nocapture
	KISS_MODEL_CASES=3000 $(CARGO) test --release --locked --test model -- --nocapture
	python3 tests/soak.py $(BINARY)

# openapi.yaml against the running server, by schemathesis.
contract: build $(VENV)/ready
	$(VENV)/bin/python tests/openapi.py $(BINARY)

$(VENV)/ready: tests/requirements.txt
	python3 -m venv $(VENV) || (apt-get update && apt-get install -y python3 python3-venv && python3 -m venv $(VENV))
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# The console in Chromium, and in the form that prettier gives it (`make console-format`).
console: build $(NODE_DIR)/ready
	command -v chromium >/dev/null || (apt-get update && apt-get install -y --no-install-recommends chromium)
	cd $(NODE_DIR) && npx prettier $(PRETTIER) --check $(CURDIR)/console/*.js
	cd $(NODE_DIR) && cp $(CURDIR)/tests/console.mjs . && node console.mjs $(CURDIR)/$(BINARY)

console-format: $(NODE_DIR)/ready
	cd $(NODE_DIR) && npx prettier $(PRETTIER) --write $(CURDIR)/console/*.js

# The pictures in docs/console.md, of a server that does something. Takes two minutes.
screenshots: build $(NODE_DIR)/ready
	cd $(NODE_DIR) && cp $(CURDIR)/tests/console.mjs . && ROOT=$(CURDIR) SHOTS=$(CURDIR)/docs SHOTS_ONLY=1 node console.mjs $(CURDIR)/$(BINARY)

# Browsers, libraries and curl against the server, directly and through the proxies of deploy/.
clients: build $(VENV)/ready $(NODE_DIR)/ready
	$(call installed,chromium curl openssl nginx haproxy caddy)
	$(VENV)/bin/python tests/clients.py $(BINARY)
	cd $(NODE_DIR) && cp $(CURDIR)/tests/clients.mjs . && node clients.mjs $(CURDIR)/$(BINARY) $(CURDIR)/deploy

# What deploy/ says, held against the server and the programs it is written for.
check-deploy: build $(VENV)/ready
	$(call installed,prometheus caddy)
	command -v systemd-analyze >/dev/null || (apt-get update && apt-get install -y --no-install-recommends systemd)
	$(VENV)/bin/python tests/deploy.py $(BINARY)

# Programs that are missing, by apt; each is named like its package.
installed = missing=; for tool in $(1); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -z "$$missing" || { apt-get update && RUNLEVEL=1 apt-get install -y --no-install-recommends $$missing; }

$(NODE_DIR)/ready: tests/package.json
	command -v npm >/dev/null || (apt-get update && apt-get install -y nodejs npm)
	mkdir -p $(NODE_DIR)
	cp tests/package.json $(NODE_DIR)/
	cd $(NODE_DIR) && npm install --silent --no-audit --no-fund
	touch $@

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features lab -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check bans licenses sources
