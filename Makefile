# `make demo` and `make test` need only python3 (3.10 to 3.13), make and a package registry.
# On Windows use the two lines in README.md, "Without make".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMFYUI := $(shell $(PYTHON) -c "import os,pathlib; r=pathlib.Path.cwd(); c=os.environ.get('COMFYUI_PATH'); p=[pathlib.Path(c)] if c else [*r.parents, pathlib.Path.home()/'ComfyUI']; print(next((str(x) for x in p if (x/'comfy_api').is_dir()), ''))")

.PHONY: demo test check format clean

# Rebuilt when what it is made from changes, or when a ComfyUI appears.
$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard $(COMFYUI)/requirements.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]" $(if $(COMFYUI),-r $(COMFYUI)/requirements.txt)
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m hotpath demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .typecheck && ln -sfn .. .typecheck/hotpath
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck demo_output build dist *.egg-info
