# Each target works on a fresh clone. ARGS="..." goes to pytest, which has JOBS workers, one for each
# core by default; SEED, FAMILY, PHOTO, CKPT and COMFYUI_PATH reach the programs through the environment.
# PYTHON=python3.12 is the Python that the first run makes .venv with.
SHELL := /bin/bash
VENV := .venv/bin/python
JOBS := $(shell getconf _NPROCESSORS_ONLN)
export PHOTO CKPT

.PHONY: setup lint test fuzz demo thumbnails mini-sd-check main-job test-photos test-browser
.PHONY: bench-quality bench-cost bench-full bench-start bench-styles bench-together encoder-mini adapter-mini

setup:
	@bash tools/setup.sh

lint: setup
	@$(VENV) -m ruff check --quiet .
	@$(VENV) -m ruff format --check --quiet .
	@comfyui=$$(cd "$$($(VENV) tools/comfyui.py)" && pwd) && \
		printf '{"extends": "../pyproject.toml", "extraPaths": ["%s"]}\n' "$$comfyui" > \
		.venv/pyright.json
	@$(VENV) -m pyright --project .venv/pyright.json

# Workers with a thread each: several threads of several workers wait for each other.
test: export OMP_NUM_THREADS := 1
test: lint
	@$(VENV) -m pytest -n $(JOBS) $(ARGS)

fuzz: setup
	@$(VENV) tests/fuzz

demo: setup
	@$(VENV) -m tools.demo

thumbnails: setup
	@$(VENV) -m tools.thumbnails

mini-sd-check: setup
	@$(VENV) tests/mini_sd/check.py

main-job: setup
	@$(VENV) -m benchmarks.main_job

bench-quality: setup
	@$(VENV) -m benchmarks.quality

bench-cost: setup
	@$(VENV) -m benchmarks.cost

# Figures on real photos, a contact sheet in output/photos.png, and those tests of `make test`.
test-photos: export OMP_NUM_THREADS := 1
test-photos: setup
	@$(VENV) tests/photos/measure.py
	@$(VENV) -m pytest tests/photos $(ARGS)

# In the real frontend, part of `make test`; screenshots are left in output/screenshots.
test-browser: export OMP_NUM_THREADS := 1
test-browser: setup
	@$(VENV) -m pytest tests/server/browser $(ARGS)

encoder-mini: setup
	@$(VENV) -m benchmarks.encoder_mini

adapter-mini: setup
	@$(VENV) -m benchmarks.adapter_mini

bench-start: setup
	@$(VENV) -m benchmarks.start

# Several people in one picture are of the second drawn world.
bench-people: export WORLD := 2
bench-people: setup
	@$(VENV) -m benchmarks.people

# Styles are of the second drawn world, too.
bench-styles: export WORLD := 2
bench-styles: setup
	@$(VENV) -m benchmarks.styles

# FAMILY=sdxl wants 16 GB of memory and 7 GB in the folder for temporary files.
bench-full: setup
	@$(VENV) -m benchmarks.full

bench-together: setup
	@$(VENV) -m benchmarks.together
