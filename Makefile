# Everything runs in .venv, made from the project's own files on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small networks lose by more than one thread.
export OMP_NUM_THREADS ?= 1

.PHONY: train test kernels slow check bench install clean

train: install
	$(BIN)/lora-ws train

test: install
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --ignore tests/contract
	# The contract suite runs with array shapes checked at run time.
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 tests/contract \
		--jaxtyping-packages=lora_ws.functional,lora_ws.models,beartype.beartype
	$(BIN)/python -m pytest -q --nbmake -n 2 notebooks

# The tests on the kernels that other processors use; the last needs AVX-512 here.
kernels: install
	failed=0; for kernel in default avx2 avx512; do echo "== $$kernel"; \
		ATEN_CPU_CAPABILITY=$$kernel $(MAKE) test || failed=1; done; exit $$failed

slow: install
	$(BIN)/python -m pytest -q -m "slow or gpu"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

install: $(VENV)/.installed

# torch first: plain dependency resolution would fetch a CUDA build of several gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
