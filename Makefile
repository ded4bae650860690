# What can be made here; `make` lists it.

SHELL = /bin/bash
PYTHON = .venv/bin/python
# Mounting images takes root; tests that play an unprivileged user drop to nobody themselves.
AS_ROOT = $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
SHELL_SCRIPTS = $(shell git ls-files -co --exclude-standard .ci bin mount-helpers scripts tests perf ':!*.py' | \
	xargs -r grep -lE '^(\#!(/bin/sh|/bin/bash|/usr/bin/env (ba)?sh)|\# shellcheck shell=)' --)
# For example: make test PYTEST_ARGS='-k rename -x'. Without, all tests run, on all processors, and are measured.
PYTEST_ARGS = -n auto --dist worksteal --cov --cov-report=term --cov-fail-under=90

# For example: make boot-test-full BOOT_ARGS='-k sysvinit'
BOOT_ARGS = -n auto --dist worksteal

# For example: make release-test RELEASE_ARGS='-k trixie'
RELEASE_ARGS =

# For example: make fuzz FUZZ_ARGS='--seconds 600 ext3 union'
FUZZ_ARGS =

.PHONY: help setup demo test boot-test boot-test-full release-test fuzz lint perf install-boot clean

help: ## say what can be made (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## install what cowfs needs, and cowfs itself in .venv
	@scripts/setup

demo: setup ## see it work: a squashfs root, changed, kept in a store, there again at the next mount
	@scripts/demo

test: ## run the whole test suite and require 90 % coverage
	@scripts/setup --test
	@install -d -m 1777 .cache/coverage && rm -f .cache/coverage/data*
	$(AS_ROOT) $(PYTHON) -m pytest -m "not nightly" $(PYTEST_ARGS)

boot-test: ## boot virtual machines from cowfs (a part of make test)
	@scripts/setup --test
	$(AS_ROOT) $(PYTHON) -m pytest -m "not nightly" $(BOOT_ARGS) tests/boot

boot-test-full: ## and with systemd, sysvinit, initramfs-tools and dracut: an hour or so
	@scripts/setup --test
	$(AS_ROOT) $(PYTHON) -m pytest $(BOOT_ARGS) tests/boot

release-test: ## make demo and all checks on bare systems of Debian 12 and 13: an hour or two
	@scripts/setup --test
	$(AS_ROOT) $(PYTHON) -m pytest $(RELEASE_ARGS) tests/release

fuzz: ## look for inputs that do harm: a minute for each target, or as FUZZ_ARGS says
	@scripts/setup --test --fuzz
	$(AS_ROOT) $(PYTHON) -m tests.fuzz.run $(FUZZ_ARGS)

lint: ## check the source: ruff, mypy, import-linter, shellcheck
	@scripts/setup --lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck $(SHELL_SCRIPTS)

perf: ## measure cowfs beside the kernel's overlayfs and other filesystems
	@scripts/setup --perf
	$(AS_ROOT) $(PYTHON) -m perf.run $(PERF_ARGS)

# For example: make install-boot DESTDIR=/tmp/tree PREFIX=/usr. What is installed finds itself below PREFIX.
DESTDIR =
PREFIX = /usr
BOOT = $(DESTDIR)$(PREFIX)/lib/cowfs
INITRAMFS_TOOLS = $(DESTDIR)$(PREFIX)/share/initramfs-tools
DRACUT = $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/90cowfs
MKINITCPIO = $(DESTDIR)$(PREFIX)/lib/initcpio
SYSTEMD = $(DESTDIR)$(PREFIX)/lib/systemd/system
SYSVINIT = $(DESTDIR)/etc/init.d
install-boot: ## install what it takes to boot from cowfs (DESTDIR and PREFIX are honoured)
	@command -v busybox >/dev/null && ! ldd "$$(command -v busybox)" >/dev/null 2>&1 || \
		{ echo 'install-boot: needs a static busybox (Debian: busybox-static)' >&2; exit 1; }
	install -d $(BOOT) $(INITRAMFS_TOOLS)/hooks $(INITRAMFS_TOOLS)/scripts $(DRACUT) $(MKINITCPIO)/install \
		$(MKINITCPIO)/hooks $(SYSTEMD) $(SYSVINIT)
	install -m 755 "$$(command -v busybox)" $(BOOT)/busybox
	install -m 755 mount-helpers/boot/mount-root mount-helpers/boot/shutdown $(BOOT)
	install -m 644 mount-helpers/boot/cowfs-options.sh mount-helpers/boot/cowfs-boot.sh mount-helpers/boot/modules $(BOOT)
	install -m 755 mount-helpers/initramfs-tools/hooks/cowfs $(INITRAMFS_TOOLS)/hooks/cowfs
	install -m 644 mount-helpers/initramfs-tools/scripts/cowfs $(INITRAMFS_TOOLS)/scripts/cowfs
	install -m 755 mount-helpers/dracut/90cowfs/*.sh $(DRACUT)
	install -m 644 mount-helpers/mkinitcpio/install/cowfs $(MKINITCPIO)/install/cowfs
	install -m 644 mount-helpers/mkinitcpio/hooks/cowfs $(MKINITCPIO)/hooks/cowfs
	install -m 644 mount-helpers/systemd/cowfs@.service $(SYSTEMD)/cowfs@.service
	install -m 755 mount-helpers/sysvinit/cowfs-shutdown $(SYSVINIT)/cowfs-shutdown
	sed -i '/^library=/s|/usr/lib/cowfs|$(PREFIX)/lib/cowfs|' $(INITRAMFS_TOOLS)/hooks/cowfs
	[ $(PREFIX) = /usr ] || sed -i -e 's|/usr/lib/cowfs/modules|$(PREFIX)/lib/cowfs/modules|' \
		-e 's|"/usr/lib/cowfs/$$file"|"$(PREFIX)/lib/cowfs/$$file" "/usr/lib/cowfs/$$file"|' \
		$(DRACUT)/module-setup.sh $(MKINITCPIO)/install/cowfs
	[ $(PREFIX) = /usr ] || sed -i 's|/usr/bin/cowfs|$(PREFIX)/bin/cowfs|' $(SYSTEMD)/cowfs@.service

clean: ## remove all that make has made here
	rm -rf .venv .cache build dist *.egg-info htmlcov .coverage* .*_cache .hypothesis
	find cowfs tests perf -name __pycache__ -prune -exec rm -rf {} +
