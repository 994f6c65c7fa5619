# make reproduce [SEED=1]   base -> SFT -> GRPO -> evaluation on the micro world, on a CPU; prints the table
# make med [SEED=1]         X-Reasoner-Med: on from there, on a second domain's text; prints the table before and after
# make test                 all tests, on the CPU also where there is a GPU
# make gpu                  what needs a GPU: the tests of it, and the benches; -k goes on after a failure
# Both set up .venv on first use; PYTHON=python3.12 picks another interpreter for it.
PYTHON ?= python3
SEED ?= 0
SHELL = bash
.SHELLFLAGS = -o pipefail -c

.PHONY: reproduce med claims claims-quick test gpu

reproduce: .venv/installed
	.venv/bin/python micro/reproduce.py --seed $(SEED)

med: .venv/installed runs/reproduce/grpo/model
	.venv/bin/python micro/med.py --seed $(SEED)

runs/reproduce/grpo/model: | .venv/installed
	.venv/bin/python micro/reproduce.py --seed $(SEED)

# Every claim of the paper on the micro world, into docs/claims.md: hours, and it goes on where it was
# interrupted. make claims CLAIMS="--claim med --seeds 0 1" makes a part, CLAIMS=--plan says how long.
claims: .venv/installed
	.venv/bin/python micro/claims.py $(CLAIMS)

claims-quick: .venv/installed
	.venv/bin/python micro/claims.py --quick $(CLAIMS)

test: .venv/installed
	.venv/bin/python -m pytest -q tests

# What a GPU must answer, the most important first, into runs/gpu (an H200's answers are in benchmarks/gpu).
# What is there is not asked again: an interrupted run goes on, a file that is deleted is made anew. A bench shows everything, and keeps it in
# NAME.txt, and its last line, the figures, in NAME.json. PEER="--peer PEER/bin/python" runs the peers too.
# TEST_ON=gpu: the tests see the GPU only if it is said (tests/conftest.py).
G = runs/gpu
# Another interpreter, which has torch and pytest already: make gpu RUN=python3
RUN = .venv/bin/python
KEEP = | tee $(@:.json=.txt) && tail -n 1 $(@:.json=.txt) > $@.new && mv $@.new $@
KEEP_TESTS = | tee $@.new && mv $@.new $@
STEP = $(RUN) benchmarks/train_step.py --device cuda --json
ROLLOUT = $(RUN) benchmarks/rollout.py --device cuda --dtype bfloat16 --samples 1 --json --repeats 2

gpu: $(addprefix $(G)/, kernels-tests.txt gpu-tests.txt \
	sft-3b.json grpo-3b.json sft-7b.json grpo-7b.json sft-7b-states-on-host.json \
	rollout-3b-batch1.json rollout-7b-batch1.json rollout-7b-batch128.json attention.json logprob.json)

$(G): $(if $(filter .venv/%,$(RUN)),.venv/installed)
	mkdir -p $@

$(G)/kernels-tests.txt: | $(G)
	TEST_ON=gpu $(RUN) -m pytest -q -rs tests/test_triton_*.py $(KEEP_TESTS)
$(G)/gpu-tests.txt: | $(G)
	TEST_ON=gpu $(RUN) -m pytest -q -rs tests -m gpu $(KEEP_TESTS)
$(G)/sft-%-states-on-host.json: | $(G)
	$(STEP) --stage sft --shape $* --states-on host $(KEEP)
$(G)/sft-%.json: | $(G)
	$(STEP) --stage sft --shape $* $(KEEP)
$(G)/grpo-%.json: | $(G)
	$(STEP) --stage grpo --shape $* $(KEEP)
$(G)/rollout-%-batch1.json: | $(G)
	$(ROLLOUT) --shape $* --prompts 1 --new-tokens 256 --peer-batches 1 $(PEER) $(KEEP)
$(G)/rollout-%-batch128.json: | $(G)
	$(ROLLOUT) --shape $* --prompts 128 --slots 128 --prompt-tokens 1920 --new-tokens 256 \
		--peer-batches 128 $(PEER) $(KEEP)
$(G)/attention.json: | $(G)
	$(RUN) benchmarks/attention.py --device cuda --json $(KEEP)
$(G)/logprob.json: | $(G)
	$(RUN) benchmarks/logprob.py --device cuda --json $(PEER) $(KEEP)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
