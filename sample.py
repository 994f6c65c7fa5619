"""Sampling: first the definition, then the engine that GRPO and every evaluation use.

    python sample.py --model Qwen2.5-VL-7B-Instruct --image cat.png --prompt "What is this?" --json

`sample_plainly` is what sampling means: one sequence, without cache or batch. `Sampler` does the
same, faster, with any number of slots and in any order (tests/test_sample.py compares the two):

* A fixed number of slots decode together, a token each per step. A slot whose sequence has ended
  goes to the next in the queue at once, so that nothing waits for the longest (continuous
  batching: Orca, Yu et al., OSDI 2022).
* Prompts are run packed end to end, without padding. The n samples of a prompt share one pass,
  whose keys and values are copied to their slots; an image passes the vision tower once.
* On a GPU a step is two CUDA graphs (kernels/graphs.py), and Python reads what has come of it.
* The KV cache is one contiguous block, of as many slots as a GPU's memory has room for. A paged
  one (vLLM, arXiv 2309.06180) is left out on purpose: at 57,344 bytes a token for the 7B, 200 slots
  of 4,600 tokens take 53 GB, and fit beside the 17 GB of weights on one 80 GB card.

Shapes: B slots, L layers, K key/value heads, D head dim, T prompt tokens, C width, V vocabulary.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import ImageConfig, InputError, Prompt, Tokenizer, check_vocabulary, make_prompt
from data.completions import (
    Completion,
    Request,
    SamplingParams,
    ThinkBudget,
    as_json,
    random_numbers,
    random_streams,
)
from hub.config import Config
from hub.device import DEVICE_HELP, DTYPE_HELP, DTYPES, free_memory, in_gib, memory_phase, prepare
from hub.options import MICRO_BASE, option, parse_options, run_command
from hub.ranks import rank
from kernels import fast_linears, sampling_step, widest_float
from kernels.graphs import Graphs
from kernels.triton_or_none import wanted_kernels
from model import KVCache, PromptCache, Qwen2_5_VL, prefill_memory, rope_positions, slots_that_fit

PREFILL_TOKENS = 4096  # of the prompts that are run in one pass, image tokens included

# --- The definition ---


@torch.inference_mode()
def sample_plainly(
    model: Qwen2_5_VL, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams, rng: Random
) -> Completion:
    """Samples one completion by definition: everything is run anew for each token."""
    masked_ids = tokenizer.never_sampled(model.config.vocab_size)
    images = {"pixel_values": prompt.pixel_values(), "image_grid_thw": prompt.grids or None}
    limit = min(params.max_new_tokens, model.config.max_position_embeddings - len(prompt.ids))
    budget = ThinkBudget(params.think_budget, tokenizer)
    completion = Completion()
    ended = False
    while not ended:
        # 1. The hidden state behind the last token predicts the next one.
        hidden = model(torch.tensor([prompt.ids + completion.ids]), **images)
        logits = model.logits(hidden[:, -1])

        # 2. Take one, unless the think budget says which one must come.
        uniforms = torch.tensor([rng.random()], dtype=torch.float64)
        ids, log_probs = sampling_step(logits, uniforms, masked_ids, **params.distribution())
        forced = budget.forced_token(completion.ids)
        token = int(ids[0]) if forced is None else forced

        # 3. Write it down. A stop token ends the completion, and belongs to it.
        completion.add(token, float(log_probs[0, token]), forced is not None)
        ended = completion.finish_if_ended(limit, tokenizer.stop_ids)
    completion.text = tokenizer.decode(completion.ids)
    return completion


# --- The same, faster ---


class Sampler:
    """Samples completions for a list of prompts, text and images mixed, in `max_batch` slots.

    `frozen`: the model is only sampled from, and may be taken apart (on a CPU its weights move to
    another layout). `stop_ids` end a completion; None takes the tokenizer's, and without any, all
    have full length. Raises InputError where the tokenizer has ids beyond the model's vocabulary.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 256,
        frozen: bool = False,
        stop_ids: Sequence[int] | None = None,
    ):
        check_vocabulary(tokenizer, model.config)
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.fast_model = fast_linears(model, release=frozen)  # what is run
        self.context = model.config.max_position_embeddings
        self.masked_ids = tokenizer.never_sampled(model.config.vocab_size).to(self.device)
        self.stop_ids = tuple(tokenizer.stop_ids if stop_ids is None else stop_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        progress: bool = False,
        on_token: Callable[[int, int, list[int]], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
        streams: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Returns params.n completions of each prompt, in order. `check` says what is refused.

        `on_token` is called after every token with the prompt's number, the sample's, and all ids
        so far. `on_completion` is called with the two numbers and the completion as soon as it has
        ended, so that Ctrl-C loses no others; then none is kept here, and the result is empty.
        `streams` has a number for each prompt, which its random numbers depend on: a question that
        is named by one gets the same samples again, whatever else is asked.
        """
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {i + 1}")
        rollout = Rollout(self, prompts, params, streams or random_streams(prompts))
        groups: list[list] = [[None] * params.n for _ in prompts]
        total = len(prompts) * params.n
        with tqdm(desc="sampling", total=total, disable=not progress, leave=False) as bar:
            for request in rollout.run(on_token):
                bar.update()
                if on_completion is not None:
                    on_completion(request.prompt, request.sample, request.completion)
                else:
                    groups[request.prompt][request.sample] = request.completion
        # Hand everything back: the cache, the graphs, and on a GPU what torch would keep of them.
        del rollout
        torch.cuda.empty_cache()
        return groups if on_completion is None else []

    def fits(self, prompt: Prompt) -> bool:
        """Returns whether a prompt leaves room in the context."""
        return len(prompt.ids) < self.context

    def check(self, prompt: Prompt, name: str) -> None:
        """Raises InputError for a prompt without room for an answer, or with images in vain."""
        if not self.fits(prompt):
            count = len(prompt.ids)
            raise InputError(f"{name}: its {count} tokens do not fit the context of {self.context}")
        if prompt.grids and self.model.config.vision is None:
            raise InputError(f"{name}: this model has no vision tower: it takes no images")


@dataclass
class PrefilledPrompt:
    """What is kept of a prompt that has been run: all that its samples begin with."""

    keys: Tensor  # [L, K, T, D]
    values: Tensor
    hidden: Tensor  # [C], behind its last token
    position: int  # of the first new token


class Slots:
    """The device's side of a rollout. Row b of every tensor belongs to the sequence in slot b."""

    def __init__(self, sampler: Sampler, size: int, max_length: int):
        config, device, dtype = sampler.model.config, sampler.device, sampler.dtype
        self.cache = KVCache(config, size, max_length, device=device, dtype=dtype)
        self.hidden = torch.zeros(size, config.hidden_size, device=device, dtype=dtype)
        self.position = torch.zeros(size, device=device, dtype=torch.long)  # of the next token
        # What a sampling step takes from the host, and what it tells it.
        self.uniform = torch.zeros(size, device=device, dtype=widest_float(device))
        self.forced = torch.full([size], -1, device=device)  # a token, or -1: the model is free
        self.token = torch.zeros(size, device=device, dtype=torch.long)
        self.log_prob = torch.zeros(size, device=device)

    def begin(self, slot: int, start: PrefilledPrompt) -> None:
        """Copies a prompt's state into a slot."""
        self.cache.fill(slot, start.keys, start.values)
        self.hidden[slot] = start.hidden
        self.position[slot] = start.position

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies sequences into other slots, between a sampling step and the decoding of it.

        Hidden states stay behind: decoding writes them anew.
        """
        self.cache.move(sources, targets)
        self.position[targets] = self.position[sources]
        self.token[targets] = self.token[sources]


class Rollout:
    """One call of `generate`: the host's side, which knows what is in which slot."""

    said = False  # once in a process: that memory decides how many slots there are

    def __init__(
        self, sampler: Sampler, prompts: list[Prompt], params: SamplingParams, streams: list[int]
    ):
        self.sampler, self.prompts, self.params, self.streams = sampler, prompts, params, streams
        self.model, self.masked_ids = sampler.fast_model, sampler.masked_ids
        self.limits = [min(params.max_new_tokens, sampler.context - len(p.ids)) for p in prompts]
        # The shortest prompts come first. On a CPU a slot attends over as many keys as the longest
        # one has, so those of like length should run together (docs/log.md: 1.3 times as fast).
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)))
        self.ready: deque[tuple[Request, PrefilledPrompt]] = deque()
        self.live: list[Request] = []  # by slot
        lengths = [len(p.ids) + limit for p, limit in zip(prompts, self.limits)]
        self.max_length = max(lengths, default=0)
        self.size = self.num_slots()
        self.slots = Slots(sampler, self.size, self.max_length)
        self.graphs = Graphs(enabled=sampler.device.type == "cuda")

    def num_slots(self) -> int:
        """Returns how many sequences decode together: on a GPU no more than fit its free memory.

        Raises InputError where that is none.
        """
        sampler, config = self.sampler, self.sampler.model.config
        wanted = min(sampler.max_batch, len(self.prompts) * self.params.n)
        free = free_memory(sampler.device)
        if free is None or wanted == 0:
            return wanted
        longest_prompt = max(len(prompt.ids) for prompt in self.prompts)
        reserve = prefill_memory(config, max(PREFILL_TOKENS, longest_prompt), sampler.dtype)
        size = KVCache.bytes_per_slot(config, self.max_length, sampler.dtype)
        slots = slots_that_fit(free - reserve, size, wanted)
        length, there = f"{self.max_length:,} tokens", f"{in_gib(free)} are free"
        if slots == 0:
            needed = in_gib(reserve + size)
            raise InputError(
                f"sampling {length} in a single slot takes {needed}, and {there}; "
                "what helps: a lower --max-new-tokens, shorter prompts"
            )
        if slots < wanted and not Rollout.said and rank() == 0:
            Rollout.said = True
            tqdm.write(f"sampling in {slots} slots of {length}: {there}", file=sys.stderr)
        return slots

    def run(self, on_token: Callable | None) -> Iterator[Request]:
        """Yields the requests as they end."""
        while self.refill():
            # A turn fills the free slots, samples a token in each, takes out what has ended, and
            # runs the tokens of the others.
            self.slots.cache.longest = self.longest()
            self.sample()
            if on_token is not None:
                for request in self.live:
                    on_token(request.prompt, request.sample, list(request.completion.ids))
            yield from self.collect()
            self.decode()

    def refill(self) -> bool:
        """Gives free slots to the next in the queue. Returns whether any slot is in use."""
        while len(self.live) < self.size and (self.ready or self.waiting):
            if not self.ready:
                self.prefill(self.next_prompts())
            request, start = self.ready.popleft()
            self.slots.begin(len(self.live), start)
            self.live.append(request)
        return bool(self.live)

    def next_prompts(self) -> list[int]:
        """Takes as many waiting prompts as PREFILL_TOKENS allow, and at least one."""
        chosen, tokens = [], 0
        while self.waiting:
            tokens += len(self.prompts[self.waiting[0]].ids)
            if chosen and tokens > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def prefill(self, chosen: list[int]) -> None:
        """Runs prompts in one pass, and makes the requests for their samples."""
        # 1. Lay them end to end, each with its own positions. Only now are images turned into
        # patches, which take 24 bytes a pixel: those of all prompts would not fit into memory.
        sampler, params = self.sampler, self.params
        prompts = [self.prompts[i] for i in chosen]
        lengths = [len(prompt.ids) for prompt in prompts]
        borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        input_ids = [torch.tensor([prompt.ids]) for prompt in prompts]
        position_ids, next_positions, patches, grids = [], [], [], []
        for ids, prompt in zip(input_ids, prompts):
            positions, next_position = rope_positions(ids, prompt.grids, sampler.model.config)
            position_ids.append(positions)
            next_positions.append(int(next_position))
            if prompt.grids:
                patches.append(prompt.pixel_values())
                grids += prompt.grids

        # 2. Run them. The cache keeps the keys and values that are computed anyway.
        cache = PromptCache(
            sampler.model.config, sum(lengths), device=sampler.device, dtype=sampler.dtype
        )
        hidden = self.model(
            torch.cat(input_ids, -1).to(sampler.device),
            position_ids=torch.cat(position_ids, -1).to(sampler.device),
            pixel_values=torch.cat(patches).to(sampler.device) if patches else None,
            image_grid_thw=grids or None,
            cache=cache,
            cu_seqlens=borders,
        )

        # 3. All samples of a prompt begin behind its last token, with random numbers of their own.
        last = hidden[0, borders[1:].to(sampler.device) - 1]
        states = zip(chosen, cache.split(lengths), last, next_positions)
        for i, (keys, values), row, position in states:
            start = PrefilledPrompt(keys, values, row, position)
            for k in range(params.n):
                rng = random_numbers(params.seed, self.streams[i], k)
                budget = ThinkBudget(params.think_budget, sampler.tokenizer)
                self.ready.append((Request(i, k, rng, budget), start))

    def longest(self) -> int:
        """Returns how many keys the fullest slot has, or for graphs something above."""
        longest = max(len(self.prompts[r.prompt].ids) + len(r.completion.ids) for r in self.live)
        return self.graphs.round_up(longest + 1, most=self.max_length, least=256) - 1

    def sample(self) -> None:
        """Samples a token for every live sequence, and writes it down."""
        # 1. Tell the device what only the host knows.
        slots, n = self.slots, len(self.live)
        forced = [request.budget.forced_token(request.completion.ids) for request in self.live]
        uniforms = [request.rng.random() for request in self.live]
        slots.forced[:n] = torch.tensor([-1 if token is None else token for token in forced])
        slots.uniform[:n] = torch.tensor(uniforms, dtype=slots.uniform.dtype)

        # 2. Take a token on the device. Its log-prob is the model's, also where it is forced.
        B = self.graphs.round_up(n, most=self.size)

        def take() -> None:
            logits = self.model.logits(slots.hidden[:B])
            distribution = self.params.distribution()
            ids, log_probs = sampling_step(
                logits, slots.uniform[:B], self.masked_ids, **distribution
            )
            slots.token[:B] = torch.where(slots.forced[:B] >= 0, slots.forced[:B], ids)
            slots.log_prob[:B] = log_probs.gather(1, slots.token[:B, None])[:, 0]

        self.graphs.run(("sample", B), take)

        # 3. Read what has come.
        results = zip(self.live, slots.token[:n].tolist(), slots.log_prob[:n].tolist(), forced)
        for request, token, log_prob, forced_token in results:
            request.completion.add(token, log_prob, forced_token is not None)

    def collect(self) -> list[Request]:
        """Takes out the sequences that have ended, and returns their requests."""
        done = []
        for slot, request in enumerate(self.live):
            if request.completion.finish_if_ended(
                self.limits[request.prompt], self.sampler.stop_ids
            ):
                request.completion.text = self.sampler.tokenizer.decode(request.completion.ids)
                done.append(slot)
        ended = [self.live[slot] for slot in done]
        self.close_holes(done)
        return ended

    def close_holes(self, done: list[int]) -> None:
        """Moves the last sequences into the slots of those that have ended."""
        kept = len(self.live) - len(done)
        holes = [slot for slot in done if slot < kept]
        last = [slot for slot in range(kept, len(self.live)) if slot not in done]
        if holes:
            self.slots.move(last, holes)
        for source, target in zip(last, holes):
            self.live[target] = self.live[source]
        del self.live[kept:]
        # Free slots may be run too, where B is rounded up: without keys, and nobody looks.
        self.slots.cache.lengths[kept:] = 0

    def decode(self) -> None:
        """Runs the tokens that were sampled, for the hidden states behind them."""
        slots, n = self.slots, len(self.live)
        if n > 0:
            B = self.graphs.round_up(n, most=self.size)
            self.graphs.run(("forward", B, slots.cache.longest), lambda: self.forward(B))
            slots.cache.lengths[:n] += 1
            slots.position[:n] += 1

    def forward(self, B: int) -> None:
        slots = self.slots
        position_ids = slots.position[:B].expand(3, B)[..., None]
        hidden = self.model(slots.token[:B, None], position_ids=position_ids, cache=slots.cache)
        slots.hidden[:B] = hidden[:, 0]


# --- The command ---


@dataclass(frozen=True)
class SampleOptions(SamplingParams):
    """Sample answers to a prompt, text or with images."""

    model: str = option(str(MICRO_BASE), "model folder")
    prompt: str | None = option(None, "the user's text; images stand before it")
    image: list[str] = option([], "image files")
    system: str | None = option(None, "system prompt (default: the template's)")
    json: bool = option(False, "print one JSON object")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)


def load_sampler(folder: str, device: str, dtype: str, **options) -> tuple[Sampler, ImageConfig]:
    """Loads a model folder to be sampled from, and its bounds on images."""
    wanted_kernels()  # a bad value is said before anything is sampled, or replaced
    config = Config.from_pretrained(folder)
    torch_device, torch_dtype = prepare(config, device, dtype)
    tokenizer = Tokenizer.from_pretrained(folder)
    with memory_phase("loading the model", "--dtype bfloat16", "a smaller model"):
        model = Qwen2_5_VL.from_pretrained(folder, device=torch_device, dtype=torch_dtype)
    images = ImageConfig.from_pretrained(folder) if config.vision is not None else ImageConfig()
    return Sampler(model, tokenizer, frozen=True, **options), images


def main(argv: list[str]) -> None:
    """Answers --prompt, and prints the responses."""
    options = parse_options(SampleOptions, argv)
    if options.prompt is None:
        raise InputError("--prompt is missing (tools/chat.py talks)")
    sampler, images = load_sampler(options.model, options.device, options.dtype)
    prompt = make_prompt(
        options.prompt, options.image, sampler.tokenizer, images, system=options.system
    )
    started = time.perf_counter()
    with memory_phase("sampling", "a lower --max-new-tokens", "a lower --n"):
        # SampleOptions are SamplingParams, and more.
        [completions] = sampler.generate([prompt], options, progress=not options.json)
    if options.json:
        print(as_json(prompt, completions, time.perf_counter() - started))
    else:
        print("\n---\n".join(completion.text for completion in completions))


if __name__ == "__main__":
    run_command(main)
