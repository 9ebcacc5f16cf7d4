# `make demo` and `make test` set everything up; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := runs/quickstart
DEMO_ARGS ?=
JOBS ?= 2

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: demo test lint format notebooks clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; choose one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)  ## train a small language model on the standard library, then let it write
	$(BIN)/lightning-llm fit --config configs/quickstart.yaml $(DEMO_ARGS)
	@echo; echo "The Hugging Face folder continues a prompt:"; echo
	@$(BIN)/lightning-llm generate --model "$$(ls -dt $(RUN)/version_*/huggingface/last | head -n 1)" --prompt "def read(self, "

test: $(READY)  ## the test suite, without the slow campaigns, by JOBS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -q -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(READY)  ## execute the notebooks and keep their outputs
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) runs build *.egg-info
