# make demo   generates text with the embedded default model (first makes .venv and installs into it)
# make test   runs the test suite (likewise), but for the slow tests: TESTS=tests runs these too
# make lint   checks style and types
#
# PYTHON picks the interpreter, VENV the environment's folder, TESTS what to run: make test TESTS="tests/models -k rope"

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests -m 'not slow'
bin := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(bin)/jaxllm generate "Once upon a time" --max-tokens 120

test: $(VENV)/.installed-test
	$(bin)/python -m pytest -n auto --dist loadfile $(TESTS)

lint: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(bin)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
