# Each target builds .venv on first use, from the pins in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo ablations test test-slow check docs dist bench bench-gpu bench-report bench-data bench-train bench-compare clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("the pins in constraints.txt need Python >= 3.11, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[dev]'
	touch $@

# A data set in RefCOCO's format, a small METRIS trained on it, its scores, its masks on unseen pictures, a report.
demo: $(VENV)/.ready
	$(BIN)/metris generate --root $(DEMO)/data --scenes easy --size 96 --train 3000 --val 120 --test 100 --workers 2
	rm -rf "$(or $(DEMO),demo)/run"
	$(BIN)/metris train --preset metris_tiny --data.root $(DEMO)/data --out $(DEMO)/run --seed $(or $(SEED),0)
	$(BIN)/metris evaluate --checkpoint $(DEMO)/run --data.root $(DEMO)/data --splits val,testA,testB --baselines
	$(BIN)/metris predict --checkpoint $(DEMO)/run --data.root $(DEMO)/data --split testA --count 4 --out $(DEMO)/pictures
	$(BIN)/metris predict --checkpoint $(DEMO)/run --data.root $(DEMO)/data --split testB --count 4 --out $(DEMO)/pictures
	@echo "checkpoint: $(DEMO)/run   metrics: $(DEMO)/run/metrics.json   pictures: $(DEMO)/pictures"
	$(BIN)/metris report $(DEMO)/run --data.root $(DEMO)/data
	@echo "own image: $(BIN)/metris app --checkpoint $(DEMO)/run, or $(BIN)/metris predict --checkpoint $(DEMO)/run --image FILE --expression 'the red circle'"

# An ablation table of the paper on procedural scenes: make ablations TABLE=5, or 6, fig6, 8, 9, learning, lite; other
# scenes, rows, lengths and seeds by SCENES=hard ROWS=enhanced_le,full STEPS=2000 SEEDS=3. A run takes up to 5 minutes
# on 2 cores, in proportion to its steps; the decoder is narrower than the demo's, but for lite.
SCENES ?= easy
ROOM = $(DEMO)/ablations$(if $(filter-out easy,$(SCENES)),/$(SCENES))
ablations: $(VENV)/.ready
	$(BIN)/metris generate --root $(ROOM)/data --scenes $(SCENES) --size 96 --train 3000 --val 150 --test 20 --workers 2
	$(BIN)/metris ablate --preset metris_tiny $(if $(filter lite,$(TABLE)),,--model.decoder_dim '[48,32,24,16]') \
		--data.root $(ROOM)/data --out $(ROOM)$(if $(STEPS),/$(STEPS))$(if $(filter lite,$(TABLE)),/lite) --table $(or $(TABLE),5) \
		$(if $(ROWS),--rows $(ROWS)) $(if $(STEPS),--steps $(STEPS)) --seeds $(or $(SEEDS),3) --jobs 2

test: $(VENV)/.ready
# A file stays on one worker, so that what its tests share is made once.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# The triton kernels once more, in Triton's interpreter: it reads the variable when a kernel is defined.
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/ops -k triton

# Two at most: the largest takes 8 GiB.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 2

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API pages, from the docstrings: build/docs/index.html, read without a network.
docs: $(VENV)/.ready
	$(BIN)/python docs/build.py build/docs

# sdist and wheel, built and looked into: dist/. The wheel comes out of the sdist.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -m dist tests/test_dist.py

BENCH := -m pytest benchmarks -q -o python_files='bench_*.py' -o python_functions='bench_*' -o addopts= --benchmark-only \
	--benchmark-columns=median,rounds --benchmark-sort=name -W ignore::pytest_benchmark.logger.PytestBenchmarkWarning

# Ten minutes at most; replaces its rows in benchmarks/results, then draws them.
bench: $(VENV)/.ready
	$(BIN)/python $(BENCH)
	$(BIN)/python -m benchmarks.report

# Eight minutes at most, with the Python that is there: torch, triton, timm, transformers, einops, pytest-benchmark.
bench-gpu:
	$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "bench-gpu: torch sees no GPU; make bench measures the CPU")'
	$(PYTHON) $(BENCH)

bench-report: $(VENV)/.ready
	$(BIN)/python -m benchmarks.report

# Images, masks, readers and metrics, each beside what no way can avoid; rewrites their table in the README.
bench-data: $(VENV)/.ready
	$(BIN)/python -m benchmarks.data --write

# Steps of metris train: seconds, waiting for data, memory, bf16, compiled (on a GPU); a quarter of an hour on a CPU.
bench-train: $(VENV)/.ready
	$(BIN)/python -m benchmarks.training --write

# This working tree beside another revision, in turns: make bench-compare BASE=HEAD~1 ONLY='extractor .*stage4'
bench-compare: $(VENV)/.ready
	$(BIN)/python -m benchmarks.compare $(BASE) $(if $(ONLY),--only '$(ONLY)')

clean:
	rm -rf $(VENV) $(DEMO) build dist
