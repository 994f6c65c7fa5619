# make reproduce [SEED=1]   base -> SFT -> GRPO -> evaluation on the micro world, on a CPU; prints the table
# make med [SEED=1]         X-Reasoner-Med: on from there, on a second domain's text; prints the table before and after
# make test                 all tests
# make gpu                  what needs a GPU: the tests of it, and the benches
# Both set up .venv on first use; PYTHON=python3.12 picks another interpreter for it.
PYTHON ?= python3
SEED ?= 0
SHELL = bash
.SHELLFLAGS = -o pipefail -c

.PHONY: reproduce med test gpu

reproduce: .venv/installed
	.venv/bin/python micro/reproduce.py --seed $(SEED)

med: .venv/installed runs/reproduce/grpo/model
	.venv/bin/python micro/med.py --seed $(SEED)

runs/reproduce/grpo/model: | .venv/installed
	.venv/bin/python micro/reproduce.py --seed $(SEED)

test: .venv/installed
	.venv/bin/python -m pytest -q tests

# Shows everything, and keeps the last line, the figures as JSON. PEER="--peer PEER/bin/python" runs the peers too.
KEEP = | tee benchmarks/last-gpu-output.txt && tail -n 1 benchmarks/last-gpu-output.txt > benchmarks/$(1)-gpu.json
BENCH_GPU = .venv/bin/python benchmarks/rollout.py --device cuda --dtype bfloat16 --samples 1 --json --repeats 2
gpu: .venv/installed
	.venv/bin/python -m pytest -q tests/test_triton_*.py
	.venv/bin/python -m pytest -q tests -k gpu
	.venv/bin/python benchmarks/attention.py --device cuda --json $(call KEEP,attention)
	.venv/bin/python benchmarks/logprob.py --device cuda --json $(PEER) $(call KEEP,logprob)
	$(BENCH_GPU) --shape 3b --prompts 1 --new-tokens 256 $(PEER) $(call KEEP,rollout-3b-batch1)
	$(BENCH_GPU) --shape 7b --prompts 1 --new-tokens 256 $(PEER) $(call KEEP,rollout-7b-batch1)
	$(BENCH_GPU) --shape 7b --prompts 128 --slots 128 --prompt-tokens 1920 --new-tokens 256 $(PEER) $(call KEEP,rollout-7b-batch128)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
