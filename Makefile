# make reproduce [SEED=1]   base -> SFT -> GRPO -> evaluation on the micro world, on a CPU; prints the table
# make test                 all tests
# Both set up .venv on first use; PYTHON=python3.12 picks another interpreter for it.
PYTHON ?= python3
SEED ?= 0

.PHONY: reproduce test

reproduce: .venv/installed
	.venv/bin/python micro/reproduce.py --seed $(SEED)

test: .venv/installed
	.venv/bin/python -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
