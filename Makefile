# Two commands: `make train` (the main job) and `make test`. Both make or reuse .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUNS := runs/smoke
CORPUS := prepared/stdlib
export TOKENIZERS_PARALLELISM := false

.PHONY: train test lint clean

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d found, 3.11 or newer needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

train: $(VENV)/.installed
	$(PY) -m data.prepare --config configs/data/prepare_stdlib.yaml
	for kind in asentmax softmax; do \
	  $(PY) train.py --config configs/models/smoke.yaml --config configs/attention/$$kind.yaml --config configs/data/stdlib.yaml \
	    --config configs/smoke.yaml --run_dir $(RUNS)/$$kind --resume auto || exit 1; \
	done
	$(PY) -m eval.run $(RUNS)/asentmax $(RUNS)/softmax --data $(CORPUS) --output $(RUNS)/report

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2

clean:
	rm -rf $(VENV) runs prepared
