"""A step of training on tensors without contents, for the memory plan (training/plan.py).

    rehearsal = Rehearsal()
    with pretence(num_gpus), rehearsal.memory:
        sft.rehearse(options, rehearsal)        # or grpo.rehearse: the stage's own code
    rehearsal.memory.peaks

The code that runs is the code that trains: model, kernels' host side, FSDP2, optimiser, sampler.
Only the tensors are torch's fake ones, which have shapes and storages, but no contents. They say
that they are on the CPU and stand for a GPU's (without a driver, torch has no fake GPU tensors).
What the host must read of them, a loss or a sampled id, is answered with 1.

Real tensors can be rehearsed with as well: without `pretence`, on a CPU. tests/test_plan.py does
so, and compares.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.tensor import _sharding_prop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import model as model_file
from data.completions import SamplingParams
from data.prompts import Prompt
from data.responses import Response
from data.sequences import MOST_SHARING, Row, make_row
from data.tokenizer import Tokenizer
from hub.config import Config
from kernels.triton_or_none import standing_for_a_gpu
from model import Qwen2_5_VL
from sample import PREFILL_TOKENS, Rollout, Sampler
from training import parallel
from training.checkpoint import sizes, training_state
from training.memory import ACTIVATIONS, HOST, Memory
from training.optimizer import named_states, trained_weights
from training.options import TrainOptions

# The phases of a step, in their order.
ROLLOUT = "rollout"
SCORE = "score"
UPDATE = "forward and backward"
OPTIMIZER = "optimiser step"
PHASES = (ROLLOUT, SCORE, UPDATE, OPTIMIZER)
# Kinds of memory.
WEIGHTS = "weights"
COPY = "gathered copy"
GRADIENTS = "gradients"
STATES = "states"
REFERENCE = "reference"
KV_CACHE = "KV cache"
KINDS = (WEIGHTS, COPY, GRADIENTS, STATES, REFERENCE, KV_CACHE, ACTIVATIONS)


# --- Tensors without contents -------------------------------------------------------------------


class HostSide(TorchDispatchMode):
    """Lets the host's code run among fake tensors.

    What it computes of its own lists and arrays stays real. What it reads of a fake one is 1.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor not in types:
            # Real tensors give real ones. Out of nothing, torch.zeros and the like make fake ones.
            if any(isinstance(x, Tensor) for x in tree_iter((args, kwargs))):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            if dtype == torch.bool:
                return True
            return 1.0 if dtype.is_floating_point else 1


def read_nothing(folder: Path, expected: dict[str, Tensor], place) -> dict[str, Tensor]:
    """Stands for hub.weights.read_weights: what a folder's files hold, as tensors without contents.

    No file is read but config.json.
    """
    dtype = getattr(torch, Config.from_pretrained(folder).torch_dtype)
    return {
        name: place(name, torch.empty(tensor.shape, dtype=dtype))
        for name, tensor in expected.items()
    }


@contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """Makes this process rank 0 of so many. The others are not there: torch's "fake" process group,
    made for such purposes, returns from every collective at once."""
    environment = {"WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0"}
    with patch.dict(os.environ, environment):
        if count == 1:
            yield
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        try:
            # A mesh has real tensors: it is made before all others become fake.
            mesh = parallel.make_mesh(torch.device("cpu"))
            with patch.object(parallel, "make_mesh", lambda device: mesh):
                yield
        finally:
            dist.destroy_process_group()


@contextmanager
def pretence(num_gpus: int) -> Iterator[None]:
    """Inside, tensors have no contents, CPU tensors stand for a GPU's, weights are not read, and
    this process is the first of `num_gpus`."""
    with ExitStack() as stack:
        stack.enter_context(pretended_ranks(num_gpus))
        stack.enter_context(standing_for_a_gpu())
        stack.enter_context(patch.object(model_file, "read_weights", read_nothing))
        # Objects of other ranks: as if they had the same.
        stack.enter_context(patch.object(dist, "all_gather_object", repeat_own))
        # DTensor learns an operation's shapes by running it on fake tensors of the whole size. In
        # a mode of their own these do not count.
        stack.enter_context(patch.object(_sharding_prop, "detect_fake_mode", lambda: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(HostSide())
        yield


def repeat_own(parts: list, mine: object) -> None:
    parts[:] = [mine] * len(parts)


class NoTokenizer:
    """Stands for a tokenizer: the plan needs none of its texts, and a folder may have no file."""

    vocab_size = 1
    stop_ids = ()

    def never_sampled(self, rows: int) -> Tensor:
        return torch.arange(rows - 1, rows)

    def decode(self, ids: list[int]) -> str:
        return ""


# --- A step -------------------------------------------------------------------------------------


class Rehearsal:
    """Follows the memory of a stage's step: what its code makes, and in which phase.

    memory: what was counted. slots: those of the KV cache that was rehearsed, as many as a rollout
    could use. checkpoint_bytes, model_bytes: what goes to the disk, of all ranks together.
    assumed: what the step looked like, in words.
    """

    def __init__(self):
        self.memory = Memory()
        self.assumed: list[str] = []
        self.slots = 0
        self.checkpoint_bytes = 0
        self.model_bytes = 0

    def watch(
        self,
        model: Qwen2_5_VL,
        optimizer: torch.optim.Optimizer,
        reference: Qwen2_5_VL | None = None,
    ) -> None:
        """Tells the memory which tensor is what, and has the phases announce themselves."""
        memory, alone = self.memory, parallel.world_size() == 1
        weights, states = trained_weights(model), named_states(model, optimizer)

        # 1. What lies where when nothing runs.
        memory.mark(WEIGHTS, weights.values())
        memory.mark(STATES, states.values())
        memory.mark(HOST, tower_weights(model))
        if reference is not None:
            memory.mark(HOST, tower_weights(reference))
            memory.mark(HOST if alone else REFERENCE, decoder_weights(reference))
        # What a GPU's AdamW does (training/optimizer.py): without temporaries of its own.
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"] = True

        # 2. A phase begins with a forward pass, of the model or of the reference, or with the
        #    optimiser's step. The gradients that lie there by then are known as such.
        def mark_gradients() -> None:
            memory.mark(GRADIENTS, (weight.grad for weight in weights.values()))

        def before_forward(*_) -> None:
            if torch.is_grad_enabled():
                mark_gradients()
                if reference is not None and alone:
                    memory.mark(HOST, decoder_weights(reference))
                memory.enter(UPDATE)
            elif memory.current_phase != ROLLOUT:
                memory.enter(SCORE)

        def before_reference(*_) -> None:
            # Alone on a GPU the reference visits it for this (training/optimizer.py: visiting).
            memory.enter(SCORE)
            memory.mark(REFERENCE, decoder_weights(reference))

        def before_optimizer(*_) -> None:
            mark_gradients()
            memory.enter(OPTIMIZER)

        # Before FSDP's own hooks, which put the first weights together.
        model.register_forward_pre_hook(before_forward, prepend=True)
        optimizer.register_step_pre_hook(before_optimizer)
        if reference is not None:
            reference.register_forward_pre_hook(before_reference, prepend=True)

        # 3. What is saved. A tensor in shards counts as a whole.
        self.checkpoint_bytes, self.model_bytes = sizes(model, training_state(model, optimizer))

    def rows(self, tokens: int) -> list[Row]:
        """Returns rows that fill two packs of so many tokens on each rank: gradients add up.

        As many as may share a pack do, and are alike but for their last tokens. So together they
        are `tokens` long, all of them scored, and attention, which needs them in full, has the most
        to do.
        """
        self.assumed.append(
            f"packs of {tokens:,} tokens (--pack-tokens, or the longest row), all of them scored"
        )
        alike = tokens - MOST_SHARING
        ids, unscored = [0] * alike, [False] * alike
        with unset_fake_temporarily():  # the host's data is real
            rows = [make_row([*ids, 0], [True] * (alike + 1))]
            for last in range(1, MOST_SHARING):
                rows.append(make_row([*ids, last], [*unscored, True]))
        return rows * (2 * parallel.world_size())

    def longest_prompt(self, options: TrainOptions, load_questions: Callable) -> int:
        """Returns the tokens of the longest question: --max-prompt-tokens, or else the data's.

        Where the folder has no tokenizer, or the data are not there, 2,048 are assumed.
        """
        longest = options.max_prompt_tokens
        has_tokenizer = (Path(options.model) / "tokenizer.json").exists()
        if longest is None and has_tokenizer and Path(options.data).exists():
            questions = load_questions(options, Tokenizer.from_pretrained(options.model))
            longest = max(len(question.prompt.ids) for question in questions)
        if longest is None:
            longest = 2048
            self.assumed.append("questions that could not be looked at")
        return min(longest, Config.from_pretrained(options.model).max_position_embeddings - 1)

    def grpo_step(self, trainer, prompt_tokens: int) -> None:
        """Takes a step with grpo.Trainer, on prompts of this length and the longest responses."""
        options = trainer.options
        self.watch(trainer.model, trainer.optimizer, trainer.reference)
        questions = -(-options.questions_per_step // parallel.world_size())
        slots = min(questions * options.group_size, options.rollout_batch)
        self.rollout(trainer.model, trainer.dtype, prompt_tokens, options.max_new_tokens, slots)
        responses = []
        tokens = max(options.pack_tokens, prompt_tokens + options.max_new_tokens)
        for row in self.rows(tokens):
            num_scored = int(row.scored.sum())
            responses.append(Response(row, torch.zeros(num_scored), advantage=1.0))
        trainer.update(responses, options.learning_rate)

    def rollout(
        self, model: Qwen2_5_VL, dtype: torch.dtype, prompt_tokens: int, new_tokens: int, slots: int
    ) -> None:
        """Samples a token in each slot, of which this rank has a use for so many."""
        self.assumed.append(f"prompts of {prompt_tokens:,} tokens and responses of {new_tokens:,}")
        with self.memory.phase(ROLLOUT), torch.no_grad():
            plain = parallel.gather(model, dtype)
            if plain is not model:
                self.memory.mark(COPY, plain.parameters())
            # The prompts of one prefill, with so many samples of each that all slots are in use.
            prompts = [Prompt([0] * prompt_tokens)] * max(1, PREFILL_TOKENS // prompt_tokens)
            samples = -(-slots // len(prompts))
            params = SamplingParams(max_new_tokens=new_tokens, n=samples)
            sampler = Sampler(plain, NoTokenizer(), max_batch=slots)
            turn = Rollout(sampler, prompts, params, streams=[0] * len(prompts))
            cache = turn.slots.cache
            self.memory.mark(KV_CACHE, [cache.keys, cache.values])
            self.slots = turn.size
            # One turn of Rollout.run, as if all responses were about to be as long as they may.
            turn.refill()
            cache.longest = turn.max_length - 1
            turn.sample()
            turn.collect()
            turn.decode()


def tower_weights(model: Qwen2_5_VL) -> list[Tensor]:
    """Returns the weights of the vision tower, which lies on the host."""
    return [] if model.visual is None else list(model.visual.parameters())


def decoder_weights(model: Qwen2_5_VL) -> list[Tensor]:
    """Returns all other weights."""
    return list(model.decoder_weights().values())
