# make report     create .venv, install, say where the recorded results lie, run the series (preset quick)
# make test       tests without what is marked slow, the notebooks through nbval included; make test-all has all
# make test-fast  the same without the notebooks
# make lab        JupyterLab on notebooks/        make lint    ruff, pyright        make bench   benchmarks
# make pages      what is published: recorded results and public names, into results/pages
# ARGS="..."      goes to the command: make report ARGS="-p dataset fashion_mnist"

PYTHON ?= python3
# Tests run in one process a core, with one thread each: threads of several processes would wait for each other.
APART = -n auto --maxprocesses=8 --dist loadfile
WHICH = -m "not slow"
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check

report: .venv/installed
	$(BIN)/effilib run $(ARGS)

test test-all test-fast: export OMP_NUM_THREADS = 1
test: test-fast
	$(BIN)/python -m pytest $(APART) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -p no:cacheprovider notebooks

test-all: WHICH =  # also for what it depends on
test-all: test

test-fast: .venv/installed
	$(BIN)/python -m pytest $(APART) $(WHICH) $(ARGS)

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check effilib tests
	$(BIN)/pyright

pages: .venv/installed
	$(BIN)/python -m effilib.workbook.website

bench: .venv/installed
	$(BIN)/python -m tests.bench $(ARGS)

# Written last: an installation that was interrupted is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "effilib needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: torch and its libraries are several GB, once"
	$(PIP) "pip>=25.1"
	$(PIP) --constraint constraints.txt --editable . --group dev
	touch $@

.PHONY: report test test-all test-fast lab lint pages bench
