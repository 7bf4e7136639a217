# Every target sets up `.venv` by itself. `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-eval test-matrix lint format bench evidence evidence-smoke clean

demo: .venv/ready
	$(BIN)/rho demo $(DEMO_ARGS)

test: .venv/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The benchmarks' engine is a large extra that only `rho evaluate --suite` needs.
test-eval: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]'
	$(BIN)/python -m pytest tests/test_suites.py

# Where rho meets Transformers, with the newest and the oldest version that it is for.
MATRIX := tests/test_integrations.py tests/test_preference.py tests/test_examples.py tests/test_labels.py tests/test_doctor.py tests/test_trainer.py

test-matrix: .venv/ready .venv-oldest/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(MATRIX)
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(MATRIX)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/write_results.py

evidence: .venv/ready
	$(BIN)/python benchmarks/evidence.py $(EVIDENCE_ARGS)

# The whole harness on tiny settings: stopped on the way, gone on with, every run recorded once.
SMOKE := runs/evidence-smoke
evidence-smoke: .venv/ready
	rm -rf $(SMOKE)
	$(BIN)/python benchmarks/evidence.py --size smoke --out runs --results $(SMOKE) --minutes 0.4
	$(BIN)/python benchmarks/evidence.py --size smoke --out runs --results $(SMOKE)
	test "$$(wc -l < $(SMOKE)/evidence-smoke.jsonl)" -eq 11
	test -s $(SMOKE)/evidence.md -a -s $(SMOKE)/evidence-smoke.svg

# `ready` is made last, so that an interrupted installation is done again.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(huggingface_hub|tokenizers|transformers)==' constraints.txt | cat - constraints-oldest.txt > .venv-oldest/all.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .venv-oldest/all.txt torch
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .venv-oldest/all.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest runs
