# One command each. `make setup` is part of all of them and does nothing when it is done.
PYTHON ?= python3
# The torch build is the site's choice: TORCH="torch==2.13.0" takes what pip finds for this machine.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup readers viewer-pictures demo test lint serve bundle clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/dicom-node demo --out demo-output

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# OHIF, calculate-suv and an old SimpleITK for the tests (node packages need npm; without it those tests skip)
readers: setup
	$(BIN)/python tests/readers/install_readers.py

# The pictures of docs/viewers.md, as the test of OHIF leaves them
VIEWER_PICTURES := tmtv-sc tmtv-pet tmtv-sc-region tmtv-weightless-region viewer-sc-PT viewer-sc-OT viewer-pet-SEG \
	beside-a-real-pet-ours-first beside-a-real-pet-own-frame
viewer-pictures: readers
	mkdir -p docs/images/viewers runs
	$(BIN)/python -m pytest tests/readers/test_reader_ohif.py --basetemp=runs/viewers
	cp $(VIEWER_PICTURES:%=runs/viewers/ohif0/%.png) docs/images/viewers/

# Two workers, a file each at a time; conftest.py has the slow files come first. One test alone: python -m pytest tests/...
WORKERS ?= 2
test: lint readers
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=5

serve: setup
	$(BIN)/dicom-node serve --config config.toml

# The bundle that ships, again: 70 phantoms, some two and a half hours on two cores; interrupted, the same command goes on.
bundle: setup
	$(BIN)/dicom-node train phantom --cases 70 --layout nifti --out runs/phantom-data
	$(BIN)/dicom-node train prepare runs/phantom-data --out runs/phantom-prepared --recipe phantom
	$(BIN)/dicom-node train all --recipe phantom --data runs/phantom-prepared --runs runs/phantom --models pix2pix
	$(BIN)/dicom-node train all --recipe phantom --data runs/phantom-prepared --runs runs/phantom --models cyclegan
	$(BIN)/dicom-node train evaluate runs/phantom --data runs/phantom-prepared --out docs/results/phantom
	$(BIN)/dicom-node train export runs/phantom --data runs/phantom-prepared --report docs/results/phantom \
		--out pipeline/bundles/phantom --replace

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
