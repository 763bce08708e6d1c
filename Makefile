# Everything runs in .venv, made from the project's own files on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small networks lose by more than one thread.
export OMP_NUM_THREADS ?= 1
# Tests start many processes; none of them compiles what another one has.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test plain checked kernels slow check help tables examples notebooks docs bench install clean

train: install
	$(BIN)/lora-ws train

PYTEST := $(BIN)/python -m pytest -q -p no:nbmake
# A file goes to one worker, so what its tests share is made once.
WORKERS := -n 2 --dist loadfile
# These run with array shapes checked at run time.
CHECKED := tests/contract tests/attribution tests/concepts tests/diffusion
SHAPED := lora_ws.functional,lora_ws.models,lora_ws.attribution,lora_ws.concepts,lora_ws.diffusion
SHAPES := --jaxtyping-packages=$(SHAPED),shapes.checked

# Both halves run, and a failure of either is one of the target. Each is one process: a worker more
# would import and collect everything once more, which costs as much as a tenth of all tests.
test: install
	$(MAKE) --keep-going -j 2 plain checked

plain: install
	$(PYTEST) -m "not slow and not gpu" $(CHECKED:%=--ignore %)

checked: install
	$(PYTEST) -m "not slow and not gpu" $(CHECKED) $(SHAPES)

# The tests on the kernels of torch and NumPy that other processors use; the last needs AVX-512 here.
kernels: install
	failed=0; for kernel in default avx2 avx512; do echo "== $$kernel"; \
		case $$kernel in avx512) left=;; *) left="X86_V4 AVX512_ICL";; esac; \
		ATEN_CPU_CAPABILITY=$$kernel NPY_DISABLE_CPU_FEATURES=$$left $(MAKE) test || failed=1; \
		done; exit $$failed

slow: install
	failed=0; \
	$(PYTEST) $(WORKERS) -m "slow or gpu" || failed=1; \
	$(BIN)/python -m pytest -q $(WORKERS) --nbmake notebooks || failed=1; \
	exit $$failed

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# What `lora-ws COMMAND --help` and `lora-ws completion` print, rendered, and docs/cli.md;
# run it after a change of flags.
help: install
	$(BIN)/python -m lora_ws.commands.render
	$(BIN)/python docs/site/cli_page.py

# The adapter files of `lora-ws demo`, from their rows of lora-ws-mini.
examples: install
	$(BIN)/python -c "from lora_ws.audit.examples import *; write_examples(FOLDER)"

# The notebooks as they are committed, with their outputs; run it after a change of one.
notebooks: install
	$(BIN)/python docs/site/notebooks.py

# The site, into build/site; a broken link or a name without a place fails. Nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# Modules of the denoisers of the installed diffusers; run it after diffusers was updated.
tables: install
	$(BIN)/python -c "from lora_ws.diffusion.module_table import *; TABLE.write_text(table_text(), encoding='utf-8')"

# Measures everything anew, which takes hours, and writes the table of docs/performance.md.
RESULTS := benchmarks/results.jsonl
SHARED := $(patsubst %,benchmarks/%.py,common published results)
bench: install
	for script in $(filter-out $(SHARED),$(wildcard benchmarks/*.py)); do echo "== $$script"; \
		$(BIN)/python $$script --record $(RESULTS) || exit 1; done
	$(BIN)/python benchmarks/results.py

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
