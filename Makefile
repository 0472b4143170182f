# Each target works on a fresh clone. ARGS="..." goes to pytest; SEED, PHOTO, CKPT and
# COMFYUI_PATH reach the programs through the environment.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PHOTO CKPT

.PHONY: setup lint test demo thumbnails mini-sd-check main-job bench-quality bench-ablations bench-figures bench-cost publish

setup:
	@bash tools/setup.sh

lint: setup
	@$(PYTHON) -m ruff check --quiet .

test: lint
	@$(PYTHON) -m pytest $(ARGS)

demo: setup
	@$(PYTHON) -m tools.demo

thumbnails: setup
	@$(PYTHON) -m tools.thumbnails

mini-sd-check: setup
	@$(PYTHON) tests/mini_sd/check.py

main-job: setup
	@$(PYTHON) -m benchmarks.main_job

bench-quality: setup
	@$(PYTHON) -m benchmarks.quality

bench-ablations: setup
	@$(PYTHON) -m benchmarks.ablations

bench-cost: setup
	@$(PYTHON) -m benchmarks.cost

bench-figures: setup
	@$(PYTHON) -m benchmarks.figures

publish: setup
	@$(PYTHON) -m benchmarks.publish
