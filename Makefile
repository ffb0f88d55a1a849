# make report    create .venv, install, run the series (preset quick) and say where the report lies
# make test      all tests, the notebooks through nbval included
# make lab       JupyterLab on notebooks/        make lint   ruff, pyright        make bench   benchmarks
# ARGS="..."     goes to the command: make report ARGS="-p dataset fashion_mnist"

PYTHON ?= python3
# Tests run in one process a core, with one thread each: threads of several processes would wait for each other.
APART = -n auto --maxprocesses=8 --dist loadfile
BIN = .venv/bin

report: .venv/installed
	$(BIN)/effilib run $(ARGS)

test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(BIN)/python -m pytest $(APART) $(ARGS)
	$(BIN)/python -m pytest $(APART) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -p no:cacheprovider notebooks

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check effilib tests
	$(BIN)/pyright

bench: .venv/installed
	$(BIN)/python -m tests.bench $(ARGS)

# Written last: an installation that was interrupted is done again.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "effilib needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: torch and its libraries are several GB, once"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@

.PHONY: report test lab lint bench
