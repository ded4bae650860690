# What can be made here; `make` lists it.

SHELL = /bin/bash
PYTHON = .venv/bin/python
# Mounting images takes root; tests that play an unprivileged user drop to nobody themselves.
AS_ROOT = $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
SHELL_SCRIPTS = $(shell git ls-files -co --exclude-standard .ci bin mount-helpers scripts tests perf ':!*.py' | \
	xargs -r grep -lE '^(\#!(/bin/sh|/bin/bash|/usr/bin/env (ba)?sh)|\# shellcheck shell=)' --)
C_SOURCES = $(shell git ls-files -co --exclude-standard '*.c' '*.h')
# For example: make test PYTEST_ARGS='-k rename -x'. Without, all tests run, on all processors.
PYTEST_ARGS = -n auto --dist worksteal

# For example: make boot-test-full BOOT_ARGS='-k sysvinit'
BOOT_ARGS = -n auto --dist worksteal

# For example: make release-test RELEASE_ARGS='-k trixie'
RELEASE_ARGS =

# For example: make fuzz FUZZ_ARGS='--seconds 600 ext3 union'
FUZZ_ARGS =

.PHONY: help setup demo test coverage boot-test boot-test-full release-test sanitize fuzz lint tidy perf docs install install-boot uninstall deb release clean

help: ## say what can be made (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## install what cowfs needs, and cowfs itself in .venv
	@scripts/setup

demo: setup ## see it work: a squashfs root, changed, kept in a store, there again at the next mount
	@scripts/demo

test: ## run the whole test suite
	@scripts/setup --test
	$(AS_ROOT) $(PYTHON) -m pytest -m "not nightly" $(PYTEST_ARGS)

# Not in make test: measuring the daemons takes half as long again.
coverage: ## the same, and require that the tests run 90 % of the lines
	@scripts/setup --test
	@install -d -m 1777 .cache/coverage && rm -f .cache/coverage/data*
	$(AS_ROOT) $(PYTHON) -m pytest -m "not nightly" $(PYTEST_ARGS) --cov --cov-report=term --cov-fail-under=90

boot-test: ## boot virtual machines from cowfs (make test does, too, where this was made once)
	@scripts/setup --test --boot
	$(AS_ROOT) $(PYTHON) -m pytest -m "not nightly" $(BOOT_ARGS) tests/boot

boot-test-full: ## and with systemd, sysvinit, initramfs-tools and dracut: an hour or so
	@scripts/setup --test --boot
	$(AS_ROOT) $(PYTHON) -m pytest $(BOOT_ARGS) tests/boot

release-test: ## make demo and all checks on bare systems of Debian 12 and 13: an hour or two
	@scripts/setup --test --boot
	$(AS_ROOT) $(PYTHON) -m pytest $(RELEASE_ARGS) tests/release

# For example: make sanitize SANITIZE_ARGS='-k kill'
SANITIZE_ARGS = -q -m "not nightly"
sanitize: ## run the tests of the ext3 engine under AddressSanitizer and UBSan: some minutes
	@scripts/setup --test
	$(AS_ROOT) $(PYTHON) -m tests.support.sanitized $(SANITIZE_ARGS) tests/ext3

fuzz: ## look for inputs that do harm: a minute for each target, or as FUZZ_ARGS says
	@scripts/setup --test --fuzz
	$(AS_ROOT) $(PYTHON) -m tests.fuzz.run $(FUZZ_ARGS)

lint: ## check the source: ruff, mypy, import-linter, shellcheck, clang-format; and the links of the documentation
	@scripts/setup --lint --docs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck $(SHELL_SCRIPTS)
	.venv/bin/clang-format --dry-run -Werror $(C_SOURCES)
	$(PYTHON) -m sphinx -c docs/site -b dummy -W --keep-going -q . build/site-check

tidy: ## look for mistakes in the C sources: clang-tidy, a minute
	@scripts/setup --lint
	printf '%s\n' $(filter cowfs/%.c,$(C_SOURCES)) | xargs -P "$$(nproc)" -I{} .venv/bin/clang-tidy --quiet {} -- \
		-std=gnu11 -D_FILE_OFFSET_BITS=64 \
		-I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
		$$(pkg-config --cflags fuse3 liburing)

docs: ## make the documentation site, in build/site: guides, manual, Python API; a broken link is an error
	@scripts/setup --docs
	$(PYTHON) -m sphinx -c docs/site -b html -W --keep-going -q . build/site
	@echo 'open build/site/docs/site/index.html'

perf: ## measure cowfs beside the kernel's overlayfs and other filesystems
	@scripts/setup --perf
	$(AS_ROOT) $(PYTHON) -m perf.run $(PERF_ARGS)

# For example: make install PREFIX=/usr DESTDIR=/tmp/tree. packaging/files says what goes where; what is installed
# finds the rest below PREFIX. mount(8) looks for its helpers in SBIN.
DESTDIR =
PREFIX = /usr/local
SBIN = /sbin
install: ## install cowfs, its manual and the helpers of mount(8) (DESTDIR, PREFIX and SBIN are honoured)
	@[ -n "$(DESTDIR)" ] || scripts/setup --packages
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SBIN='$(SBIN)' scripts/install program

install-boot: ## install what it takes to boot from cowfs, below /usr unless PREFIX says otherwise
	@DESTDIR='$(DESTDIR)' PREFIX='$(if $(filter file,$(origin PREFIX)),/usr,$(PREFIX))' scripts/install boot

uninstall: ## remove what make install and make install-boot have installed
	@[ '$(origin PREFIX)' != file ] || DESTDIR='$(DESTDIR)' PREFIX=/usr scripts/install --remove-boot
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SBIN='$(SBIN)' scripts/install --remove

deb: ## make Debian packages for this release of Debian, in dist/
	@scripts/setup --packages --deb
	@scripts/deb

release: ## make what is published of a version that is tagged, in dist/
	@scripts/setup --release --deb
	@scripts/release

clean: ## remove all that make has made here
	rm -rf .venv .cache build dist *.egg-info htmlcov .coverage* .*_cache .hypothesis
	find cowfs tests perf -name __pycache__ -prune -exec rm -rf {} +
