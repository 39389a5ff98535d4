# The targets that developers and .ci/run share. The first one makes a virtual environment, .venv, and installs into it.
#
#   make demo     show comoe at work on a small model
#   make test     run the tests               (ARGS="-k planner" is passed on to pytest)
#   make check    ruff and mypy
#   make bench    list the benchmarks
#   make docs     write the generated pages of docs/ again
#   make clean    remove what was built; .venv stays, but is installed into again
#
# PYTHON=python3.12 names the interpreter of a new .venv; otherwise the first of CANDIDATES that is 3.11 or newer.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch without CUDA from there; pip's own settings (PIP_*,
# pip.conf) are respected either way.

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
BIN := .venv/bin
STAMP := .venv/installed
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard src/comoe/kernels/*.[ch])

.PHONY: demo test check bench docs clean

demo: $(STAMP)
	$(BIN)/comoe demo

test: $(STAMP)
	$(BIN)/pytest $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/comoe bench --help
	@echo "Run one with '$(BIN)/comoe bench NAME', faster and coarser with --quick. Figures that need no model:"
	@for script in benchmarks/*.py; do echo "  $(BIN)/python $$script"; done

PAGES := docs/analysis.md docs/cli.md docs/families.md docs/modules.md docs/schema.json

docs: $(STAMP) $(PAGES)

$(PAGES): FORCE
	$(BIN)/python docs/build_$(basename $(@F)).py > $@.partial && mv $@.partial $@

FORCE:

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)
	rm -rf src/*.egg-info src/comoe/kernels/*.so
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The kernel is compiled by the install, so its sources are inputs too. A failed install leaves no stamp.
$(STAMP): $(INPUTS) | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[run,dev,plot,edge]'
	@touch $@

# An interpreter without ensurepip (Debian's without python3-venv) cannot make one: the next candidate may.
$(BIN)/pip:
	@python=; seen=; \
	for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
		$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		seen=$$candidate; \
		$$candidate -c 'import ensurepip, venv' >/dev/null 2>&1 && python=$$candidate && break; \
	done; \
	if [ -z "$$seen" ]; then \
		echo "comoe needs Python 3.11 or newer: none of '$(or $(PYTHON),$(CANDIDATES))' is." >&2; exit 1; \
	elif [ -z "$$python" ]; then \
		echo "$$seen cannot make virtual environments: install its venv (Debian: apt install python3-venv)." >&2; \
		exit 1; \
	fi; \
	$$python -m venv --clear .venv || { rm -rf .venv; echo "$$python could not make .venv." >&2; exit 1; }
