# make demo · make test · make lint      each makes .venv first, where it is missing
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint
demo: .venv/.ready
	rm -rf runs/demo
	$(BIN)/python sage/main.py --method sage --dataset digits --arch preactresnet18 \
	  --initial_channels 16 --epochs 16 --schedule 6 12 --learning_rate 0.2 \
	  --rand_pos 0.01 --upper_lambda 0.5 --update_ratio 0.7 --seed 1 --root_dir runs/demo

test: .venv/.ready
	$(BIN)/python -m pytest -q -n 3

lint: .venv/.ready
	$(BIN)/ruff check

.venv/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
