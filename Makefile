# `make demo` and `make test` need only python3 (3.10 to 3.14), make and a package registry.
# On Windows use the two lines in README.md, "Without make".
#
#   PYTHON=python3.12 make test     another Python (VENV=.venv312 beside it keeps both environments)
#   COMFYUI_PATH=/where make demo   another ComfyUI; COMFYUI_PATH=none for no ComfyUI

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# COMFYUI_PATH, else the folders above, else ~/ComfyUI; empty when there is none.
COMFYUI := $(shell if [ -n "$$COMFYUI_PATH" ]; then set -- "$$COMFYUI_PATH"; else d="$(CURDIR)"; set --; \
	while [ "$$d" != / ]; do d=$$(dirname "$$d"); set -- "$$@" "$$d"; done; set -- "$$@" "$$HOME/ComfyUI"; fi; \
	for d in "$$@"; do if [ -d "$$d/comfy_api" ]; then echo "$$d"; break; fi; done)

# Tests and the demo start dozens of processes; where bytecode may not be kept, each compiles ComfyUI and torch anew (20 s).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all check format clean

# Made again when what it is made from changes, or when a ComfyUI appears.
$(VENV)/.ready: pyproject.toml constraints.txt overrides.txt $(wildcard $(COMFYUI)/requirements.txt)
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v[:2] else f'{sys.executable} is \
	Python {v[0]}.{v[1]}; Hotpath needs 3.10 to 3.14. Name another one: PYTHON=python3.12 make ...')"
	@# Some systems ship Python without the part of venv that brings pip; then a pip or uv outside installs into it.
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --without-pip --clear $(VENV)
	@$(BIN)/python -m uv --version >/dev/null 2>&1 \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null \
	|| $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv 2>/dev/null \
	|| uv pip install --quiet --python $(BIN)/python uv \
	|| { echo "There is no pip for $(PYTHON), and no uv. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (once; torch is large) ..."
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt --override overrides.txt -e ".[dev]" \
	  $(if $(COMFYUI),-r "$(COMFYUI)/requirements.txt")
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m hotpath demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup --all

check: $(VENV)/.ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@mkdir -p .typecheck && ln -sfn .. .typecheck/hotpath
	$(BIN)/python -m mypy

format: $(VENV)/.ready
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) .typecheck demo_output build dist *.egg-info
