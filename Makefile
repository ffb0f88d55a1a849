# make report     create .venv, install, say where the recorded results lie, run the series (preset quick)
# make test       all tests, the notebooks through nbval included; make test-fast leaves out what is slow
# make lab        JupyterLab on notebooks/        make lint    ruff, pyright        make bench   benchmarks
# make pages      what is published: recorded results and public names, into results/pages
# ARGS="..."      goes to the command: make report ARGS="-p dataset fashion_mnist"

PYTHON ?= python3
# Tests run in one process a core, with one thread each: threads of several processes would wait for each other.
APART = -n auto --maxprocesses=8 --dist loadfile
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check

report: .venv/installed
	$(BIN)/effilib run $(ARGS)

test test-fast: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(BIN)/python -m pytest $(APART) $(ARGS)
	$(BIN)/python -m pytest $(APART) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -p no:cacheprovider notebooks

test-fast: .venv/installed
	$(BIN)/python -m pytest $(APART) -m "not slow" $(ARGS)

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

.PHONY: report test test-fast lab lint pages bench
