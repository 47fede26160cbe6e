# `make demo` trains the default model; `make test` runs the tests. Both make a virtual environment first, as
# `make install` does alone.
# `make test TORCH=2.11.0` does so with that version of torch, in .venv-2.11.0: docs/compatibility.md.
PYTHON ?= python3
VENV ?= .venv$(TORCH:%=-%)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

.PHONY: install demo test test-real test-variants kernels-static gpu lint clean

install: $(VENV)/.installed-plot

demo: $(VENV)/.installed-plot
	$(BIN)/moetrain train

# A file's tests stay on one worker, since they share its costly runs; tests/conftest.py puts the longest files first.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTEST) -m "not slow and not gpu and not real"

# Launchers, sweeps and ranks that are started, killed, waited for and started again; more layouts, routers and
# options than one of each kind: longer, so after the rest.
test-real: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTEST) -m "real and not slow and not gpu"

# The tests of products, rounded as other processors, libraries and numbers of threads do: "Equal bits" in
# docs/architecture.md.
VARIANTS := OMP_NUM_THREADS=2 MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
  ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default
PRODUCTS := tests/convert tests/dist/test_dispatchers.py tests/models tests/moe tests/ops tests/test_router_tools.py \
  tests/train/optim tests/train/test_options.py tests/train/test_router_training.py tests/train/test_unloaded.py \
  $(wildcard tests/train/test_train_*.py)

test-variants: $(VENV)/.installed-dev
	@failed=; for variant in $(VARIANTS); do echo "with $$variant"; \
	  env OMP_NUM_THREADS=1 $$variant $(PYTEST) -m "not slow and not gpu and not real" $(PRODUCTS) || failed="$$failed $$variant"; done; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# One kernel in seven, for one GPU of each maker, compiled without a GPU and compared with the recorded binaries.
kernels-static: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/kernels_static.py --archs sm_90 gfx942 --every 7 --check benchmarks/kernels_static.json

# Everything that is measured on a GPU, in under seven minutes, with the Python of the machine: docs/results.md.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu/run.sh

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run launch/torchrun/*.sh launch/slurm/* launch/deepspeed/*.sh benchmarks/gpu/run.sh

# torch first, by itself: the constraint picks the build that every later requirement then finds. Another torch brings
# its own Triton.
$(VENV)/.installed-plot: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -e '$(TORCH:%=s/^torch==.*/torch==%/;/^triton==/d)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) torch
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-plot
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
