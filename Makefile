# make serve   set up on first use, then serve the default model   (make serve ARGS="--model ... --port ...")
# make test    set up on first use, then run the tests             (make test ARGS="-k scheduler")
# make test-fast  the tests that start no process, need no download and are quick: within a minute
# make test-fuzz  ten thousand requests with any values, of which none may give a 500
# make test-clients  client libraries of Python and Node against a real server
# make test-replicas  real routers and orchestrators over several servers
# make check   linter, formatter, type checker, imports between rooms, security, and the docs site in strict mode
# make web     build the page's files in server/page/ from web/; needs Node 20
# make docs    build the docs site into site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The kernels are compiled on installation: they are part of what makes an installation stale.
SOURCES := pyproject.toml setup.py $(wildcard engine/kernels/*.[ch])

ROOMS := checkpoints text engine tools server pilotfish/library pilotfish/__init__.py pilotfish/errors.py pilotfish/logs.py

CLIENTS := .venv-clients
CLIENTS_NODE := tests/clients/node
REPLICAS := .venv-replicas
RAY := .venv-ray

.PHONY: serve test test-fast test-fuzz test-clients test-replicas check format docs web clean

serve: $(VENV)/.installed
	@$(BIN)/pilotfish serve $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(ARGS)

test-fast: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses auto --dist loadgroup -m "not process and not slow and not real_model and not docker" $(ARGS)

test-fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest tests/server/test_fuzz.py -m fuzz $(ARGS)

test-clients: $(VENV)/.installed-dev $(CLIENTS)/.installed $(CLIENTS_NODE)/node_modules/.installed
	@$(BIN)/python -m pytest tests/clients -m clients $(ARGS)

test-replicas: $(VENV)/.installed-dev $(REPLICAS)/.installed $(RAY)/.installed
	@$(BIN)/python -m pytest tests/replicas -m replicas $(ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file tests/mypy.ini benchmarks tests
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive $(ROOMS)
	@.ci/audit $(BIN)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

web: web/node_modules/.installed
	@npm run --prefix web --silent build

web/node_modules/.installed: web/package-lock.json
	@npm ci --prefix web --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(BIN)/python:
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Pilotfish needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "Installing Pilotfish and what it needs (once, some minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,docs]'
	@touch $@

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@echo "Installing the client libraries of Python in $(CLIENTS)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

$(REPLICAS)/.installed: tests/replicas/requirements.txt
	@echo "Installing routers and orchestrators in $(REPLICAS)"
	@$(PYTHON) -m venv $(REPLICAS)
	@$(REPLICAS)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

$(RAY)/.installed: tests/replicas/requirements-ray.txt
	@echo "Installing Ray in $(RAY)"
	@$(PYTHON) -m venv $(RAY)
	@$(RAY)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

$(CLIENTS_NODE)/node_modules/.installed: $(CLIENTS_NODE)/package-lock.json
	@echo "Installing the client libraries of Node"
	@npm ci --prefix $(CLIENTS_NODE) --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

clean:
	rm -rf build dist site *.egg-info engine/kernels/_native*.so
