# make demo | make test | make quick | make check: each sets up everything it needs in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed
PHOTOS ?=
DATA ?=
MARKERS ?= not mount

.PHONY: demo test quick check format docs tiny clean

demo: $(CORE)
	@echo "== mmsearch demo: draws a gallery, indexes it, searches it, measures it (into build/)"
	$(BIN)/mmsearch demo $(if $(PHOTOS),"$(PHOTOS)")

test: $(STAMP)
	@echo "== tests"
	$(BIN)/python -m pytest -q -m "$(MARKERS)"

# What a person about to commit runs: two minutes.
quick: $(STAMP)
	@echo "== quick tests"
	$(BIN)/python -m pytest -q -m "not slow and not mount"

check: $(STAMP)
	@echo "== format, lint, types, import contract, generated docs, tests"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/cli_docs.py --check
	$(BIN)/python -m pytest -q -m "$(MARKERS)"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python scripts/cli_docs.py

# The bundled model, from its recipe into build/tiny/model; a stopped run goes on where it was.
tiny: $(STAMP)
	@test -n "$(DATA)" || { echo "where the data sets are: make tiny DATA=DIR (docs/datasets.md)" >&2; exit 2; }
	$(BIN)/python scripts/tiny_data.py --data "$(DATA)" --out build/tiny/data
	$(BIN)/mmsearch train clip build/tiny/data/recipe/tiny.toml --data build/tiny/data --out "$(CURDIR)/build/tiny/model"

# What indexing and searching need.
$(CORE): pyproject.toml
	@echo "== setting up $(VENV): a virtual environment with mmsearch (half a minute, 540 MB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null \
		|| { rm -rf $(VENV); $(PYTHON) -m virtualenv -q $(VENV) 2>/dev/null; } \
		|| { rm -rf $(VENV); virtualenv -q -p $(PYTHON) $(VENV) 2>/dev/null; } \
		|| { rm -rf $(VENV); echo "Python has neither venv nor virtualenv: install one of them," \
			"on Debian and Ubuntu with: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { rm -rf $(VENV); echo "mmsearch needs Python 3.11 or newer:" \
			"make PYTHON=python3.12" >&2; exit 1; }
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e .
	@touch $(CORE)

# Everything; torch alone is several gigabytes where the registry serves its CUDA build.
$(STAMP): $(CORE)
	@echo "== adding what conversion, training and the tests need (minutes, up to 7 GB)"
	$(BIN)/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
