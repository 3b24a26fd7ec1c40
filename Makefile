# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format shapes
demo: .venv/installed
	$(BIN)/python launch.py

test: .venv/installed
	$(BIN)/python -m pytest

# The shipped model's accuracy on 500 held-out questions, through the engine on 2 ranks.
shapes: .venv/installed
	$(BIN)/python examples/shapes/evaluate.py --write build/shapes
	rm -f build/shapes/answers.jsonl
	$(BIN)/python launch.py task=generate world_size=2 max_new_tokens=40 \
		input=build/shapes/requests.jsonl output=build/shapes/answers.jsonl
	$(BIN)/python examples/shapes/evaluate.py --score build/shapes/answers.jsonl

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
