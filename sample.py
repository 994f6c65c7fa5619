"""Sampling: the rollout engine that GRPO and every evaluation use.

    python sample.py --model Qwen2.5-VL-7B-Instruct --image cat.png --prompt "What is this?" --temperature 0 --json

How it is fast, from top to bottom:
* a fixed number of slots decode together, a token each per step, and a slot whose sequence has ended goes to the next
  one in the queue at once (continuous batching: Orca, Yu et al., OSDI 2022): nothing waits for the longest;
* prompts are run packed end to end, without padding; the n samples of a prompt share one pass, whose keys and values
  are copied to their slots; an image passes the ViT once;
* all that a step needs lies on the device; Python sees a sequence when it begins, ends, and is at its think budget;
* the KV cache is one contiguous block, allocated once and kept for later rollouts. A paged cache (vLLM, arXiv
  2309.06180) is left out on purpose: at 57,344 bytes a token for the 7B (2 x 28 layers x 4 heads x 128 x 2 bytes), 200
  slots of 4,600 tokens take 53 GB, and fit beside the 17 GB of weights on one 80 GB card.

What it gives equals a plain loop without cache or batch (tests/test_sample.py: `generate_plainly`), for any number of
slots and any order.
Shapes: B slots in use, L layers, K key/value heads, D head dim, T prompt tokens, C width, V vocabulary rows.
"""
import json
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import ImageConfig, InputError, Prompt, Tokenizer, check_vocabulary, load_image, make_prompt
from hub.config import Config
from hub.options import MICRO_BASE, limit_threads, option, parse_options, pick_device, run_command
from kernels import draw, is_greedy, sampling_log_probs
from model import KVCache, PromptCache, Qwen2_5_VL, rope_positions

END_OF_THOUGHT = "</think>"
TAG_GRACE = 8  # tokens that a half-written </think> may still take when the think budget is used up
PREFILL_TOKENS = 4096  # prompt tokens in one forward pass; their keys and values wait until slots are free


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The defaults sample from the model's own distribution, as RL must (no top-k, no top-p)."""
    max_new_tokens: int = option(512, "response length limit", low=1)
    temperature: float = option(1.0, "0 is greedy", low=0.0)
    top_p: float = option(1.0, "nucleus sampling; 1 is off", low=0.0, high=1.0)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", low=0)
    n: int = option(1, "completions per prompt", low=1, high=1_000_000)
    seed: int = option(0, "of the random streams", low=0)
    think_budget: int | None = option(None, "tokens after which </think> is appended if it has not come", low=0)

    def choose(self, logits: Tensor, uniforms: Tensor, masked_ids: Tensor) -> tuple[Tensor, Tensor]:
        """logits [B, V] and a uniform number per row -> ids [B], and the log-probs [B, V] that they were drawn with."""
        log_probs = sampling_log_probs(logits, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
                                       masked_ids=masked_ids)
        return log_probs.argmax(-1) if is_greedy(self.temperature) else draw(log_probs, uniforms), log_probs


@dataclass
class Completion:
    """What was sampled behind one prompt."""
    ids: list[int] = field(default_factory=list)            # with the stop token, if one came
    log_probs: list[float] = field(default_factory=list)    # natural logs, under the distribution sampled from
    forced: list[bool] = field(default_factory=list)        # ids that the think budget wrote: no actions of the model
    text: str = ""                                          # without control tokens
    finish_reason: str = ""                                 # stop, length, or forced (stopped, after a forced exit)


# --- A sequence -------------------------------------------------------------------------------------------------------

def random_streams(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """What names each prompt's random stream: its content, and how many equal prompts stand before it. So what is
    sampled behind a prompt does not depend on the rest of the batch, and equal prompts still get different samples."""
    seen, streams = Counter(), []
    for prompt in prompts:
        key = zlib.crc32(torch.tensor(prompt.ids).numpy().tobytes())
        key = key if not prompt.grids else zlib.crc32(repr(prompt.grids).encode(), key)
        streams.append((key, seen[key]))
        seen[key] += 1
    return streams


def uniform_numbers(stream: tuple[int, int], sample: int, limit: int, params: SamplingParams) -> Tensor:
    """A sequence's own random numbers, one for each of its tokens [limit]."""
    generator = torch.Generator().manual_seed(hash((params.seed, *stream, sample)) % 2**63)
    return torch.rand(limit, generator=generator)


@dataclass(eq=False)
class Request:
    """One completion to be sampled."""
    prompt: int        # of the call's prompts
    sample: int        # of the prompt's n
    limit: int         # new tokens at most
    begun: int = 0     # the step of its first token
    thought_ended: bool = False  # by itself or by force: its budget has been dealt with


def forced_exit(text: str, over: int) -> str:
    """What to do with a thought `over` tokens behind its budget: "done" (it has ended by itself), "wait" (its end is
    half written; </think> is several tokens and merges with its neighbours, so only the text counts), or "force"."""
    if END_OF_THOUGHT in text:
        return "done"
    half_written = any(text.endswith(END_OF_THOUGHT[:n]) for n in range(1, len(END_OF_THOUGHT)))
    return "wait" if half_written and over < TAG_GRACE else "force"


def completion(ids: list[int], log_probs: list[float], forced: list[bool], tokenizer: Tokenizer) -> Completion:
    """A finished completion; what does not end in a stop token was cut at its length limit."""
    reason = "length" if ids[-1] not in tokenizer.stop_ids else "forced" if any(forced) else "stop"
    return Completion(ids, log_probs, forced, tokenizer.decode(ids), reason)


# --- The slots --------------------------------------------------------------------------------------------------------

class Slots:
    """The device's side of the engine. Row b of every tensor belongs to the sequence in slot b."""

    def __init__(self, config: Config, size: int, max_length: int, max_limit: int, device: torch.device,
                 dtype: torch.dtype, cache_dtype: torch.dtype):
        self.sizes = (size, max_length, max_limit)
        self.cache = KVCache(config, size, max_length, device=device, dtype=cache_dtype)
        self.hidden = torch.zeros(size, config.hidden_size, device=device, dtype=dtype)
        self.token, self.position, self.count, self.limit = torch.zeros(4, size, dtype=torch.long, device=device)
        self.done = torch.ones(size, dtype=torch.bool, device=device)
        columns = (size, max_limit + 1)  # the last one is for what slots that are done still write
        self.ids = torch.zeros(columns, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(columns, device=device)
        self.forced = torch.full(columns, -1, device=device)  # ids to be written instead of sampled ones
        self.uniforms = torch.zeros(columns, device=device)

    def begin(self, slot: int, prompt: "PrefilledPrompt", limit: int, uniforms: Tensor) -> None:
        """Copies a prompt's state into a slot."""
        self.cache.fill(slot, prompt.keys, prompt.values)
        self.hidden[slot], self.position[slot] = prompt.hidden, prompt.position
        self.count[slot], self.limit[slot], self.done[slot] = 0, limit, False
        self.forced[slot] = -1
        self.uniforms[slot, :limit] = uniforms

    def move(self, source: list[int], target: list[int]) -> None:
        """Copies slots, with all that they hold."""
        source, target = (torch.tensor(rows, dtype=torch.long, device=self.done.device) for rows in (source, target))
        self.cache.move(source, target)
        for tensor in vars(self).values():
            if isinstance(tensor, Tensor):
                tensor[target] = tensor[source]


@dataclass
class PrefilledPrompt:
    """What is left of a prompt that has been run: all that its samples begin with."""
    keys: Tensor       # [L, K, T, D]
    values: Tensor
    hidden: Tensor     # [C], behind its last token
    position: int      # of the first new token


class Sampler:
    """Samples completions for a list of prompts, text and images mixed, in `max_batch` slots. Raises InputError where
    the tokenizer has ids beyond the model's vocabulary. `frozen`: the model is only sampled from, and may be taken
    apart (on a CPU its weights move to another layout)."""

    def __init__(self, model: Qwen2_5_VL, tokenizer: Tokenizer, *, max_batch: int = 256, frozen: bool = False):
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.context = model.config.max_position_embeddings
        self.packed = model.packed(release=frozen)  # what is run
        check_vocabulary(tokenizer, model.config)
        self.masked_ids = tokenizer.never_sampled(model.config.vocab_size).to(self.device)
        self.stop_ids = torch.tensor(sorted(tokenizer.stop_ids), device=self.device)
        self.end_of_thought = tokenizer.encode(END_OF_THOUGHT)
        self.slots: Slots | None = None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, *, progress: bool = False,
                 on_token: Callable[[int, int, list[int]], None] | None = None,
                 on_completion: Callable[[int, int, Completion], None] | None = None,
                 streams: Sequence[tuple[int, int]] | None = None) -> list[list[Completion]]:
        """params.n completions of each prompt, in order; `check` says which prompts are refused.

        `on_token` is called after every token with the prompt's number, the sample's, and all ids so far;
        `on_completion` with the numbers and the completion as soon as it is finished, so that Ctrl-C loses no others.
        `streams` names the prompts' random streams, for who must get the same samples again from some prompts alone.
        """
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {i + 1}")
        with tqdm(total=len(prompts) * params.n, unit="seq", desc="sampling", disable=not progress, leave=False) as bar:
            rollout = Rollout(self, prompts, params, bar, on_token, on_completion, streams)
            rollout.run()
        return [[rollout.finished[i, sample] for sample in range(params.n)] for i in range(len(prompts))]

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room in the context."""
        return len(prompt.ids) < self.context

    def check(self, prompt: Prompt, name: str) -> None:
        """Raises InputError for a prompt that leaves no room in the context, and images where the model takes none."""
        if not self.fits(prompt):
            raise InputError(f"{name}: its {len(prompt.ids)} tokens do not fit the context of {self.context}")
        if prompt.grids and self.model.config.vision is None:
            raise InputError(f"{name}: this model has no vision tower: it takes no images")

    def allocate(self, size: int, max_length: int, max_limit: int) -> Slots:
        """The slots of the last rollout if they are enough; else new ones, which are enough for both."""
        kind, sizes = self.device.type, (size, max_length, max_limit)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        if self.slots is not None and self.slots.cache.keys.dtype == dtype:
            sizes = tuple(map(max, sizes, self.slots.sizes))
        if self.slots is None or self.slots.cache.keys.dtype != dtype or self.slots.sizes != sizes:
            self.slots, self.graphs = None, {}  # first let go of the old ones
            self.slots = Slots(self.model.config, *sizes, self.device, self.dtype, dtype)
        return self.slots

    def prefill(self, prompts: list[Prompt]) -> list[PrefilledPrompt]:
        """Runs prompts, packed in one row without padding; every image once."""
        lengths = [len(p.ids) for p in prompts]
        positions = [rope_positions(torch.tensor([p.ids]), p.grids, self.model.config) for p in prompts]
        borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        patches = [x for x in (p.pixel_values() for p in prompts) if x is not None]
        grids, cache = [grid for p in prompts for grid in p.grids], PromptCache()
        hidden = self.packed(torch.tensor([[token for p in prompts for token in p.ids]], device=self.device),
                            position_ids=torch.cat([p for p, _ in positions], dim=-1).to(self.device),
                            pixel_values=torch.cat(patches).to(self.device) if patches else None,
                            image_grid_thw=grids or None, cache=cache, cu_seqlens=borders)
        last = hidden[0, borders[1:].to(self.device) - 1]
        return [PrefilledPrompt(keys, values, row, int(following))
                for (keys, values), row, (_, following) in zip(cache.split(lengths), last, positions)]

    def pick(self, B: int, params: SamplingParams) -> None:
        """The next token of the first B slots, from their hidden states. What slots that are done write is not read."""
        s, column = self.slots, self.slots.count[:B, None]
        uniforms = s.uniforms[:B].gather(1, column)[:, 0]
        ids, log_probs = params.choose(self.packed.logits(s.hidden[:B]), uniforms, self.masked_ids)
        if params.think_budget is not None:
            forced = s.forced[:B].gather(1, column)[:, 0]
            ids = torch.where(forced >= 0, forced, ids)
        s.token[:B] = ids
        s.ids[:B].scatter_(1, column, ids[:, None])
        s.log_probs[:B].scatter_(1, column, log_probs.gather(1, ids[:, None]))
        s.count[:B] += ~s.done[:B]
        s.done[:B] |= (ids[:, None] == self.stop_ids).any(1) | (s.count[:B] >= s.limit[:B])

    def forward(self, B: int) -> None:
        """Runs the picked tokens of the first B slots."""
        s = self.slots
        position_ids = s.position[:B].expand(3, B)[..., None]
        s.hidden[:B] = self.packed(s.token[:B, None], position_ids=position_ids, cache=s.cache)[:, 0]
        going_on = ~s.done[:B]
        s.cache.lengths[:B] += going_on
        s.position[:B] += going_on

    def run(self, work: Callable, B: int, *args) -> None:
        """work(B, *args). On a GPU from a CUDA graph, for B and the cache's length rounded up to powers of two: first
        as it is (which also warms up what cannot be captured), the second time captured, from then on replayed."""
        if self.device.type != "cuda":
            work(B, *args)
            return
        size, max_length, _ = self.slots.sizes
        B, cache, longest = min(1 << (B - 1).bit_length(), size), self.slots.cache, self.slots.cache.longest
        cache.longest = min(max(256, 1 << longest.bit_length()), max_length) - 1
        sampling = [(p.temperature, p.top_p, p.top_k, p.think_budget is None) for p in args]
        key = (B, *(sampling or [cache.longest]))
        if key not in self.graphs:
            self.graphs[key] = None
            work(B, *args)
        else:
            if self.graphs[key] is None:
                self.graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[key], pool=self.graph_pool):  # they run one after the other
                    work(B, *args)
            self.graphs[key].replay()
        cache.longest = longest


class Rollout:
    """One call of `generate`: which sequence is where, and what comes next."""

    def __init__(self, sampler: Sampler, prompts: Sequence[Prompt], params: SamplingParams, bar: tqdm,
                 on_token: Callable[[int, int, list[int]], None] | None,
                 on_completion: Callable[[int, int, Completion], None] | None,
                 streams: Sequence[tuple[int, int]] | None):
        self.sampler, self.prompts, self.params, self.bar = sampler, prompts, params, bar
        self.on_token, self.on_completion = on_token, on_completion
        self.limits = [min(params.max_new_tokens, sampler.context - len(p.ids)) for p in prompts]
        self.streams = random_streams(prompts) if streams is None else streams
        # Prompts to be run, the shortest first: every slot attends over as many keys as the longest one has, so those of
        # like length should run together, and what is left over from a short prompt delays nobody (LOG.md: 1.3 x).
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)))
        self.ready: deque[tuple[Request, PrefilledPrompt]] = deque()                           # run, and to be placed
        self.live: list[Request] = []                                                          # by slot
        self.finished: dict[tuple[int, int], Completion] = {}
        self.step, self.tokens, self.started = 0, 0, time.perf_counter()
        # The device is asked which sequences are done every so many steps: an answer takes as long as a small step.
        self.stride = 8 if sampler.device.type == "cuda" and on_token is None else 1

    def run(self) -> None:
        """Every turn: fill free slots, sample, and take out what has ended."""
        if not self.prompts:
            return
        n, lengths = len(self.prompts) * self.params.n, [len(p.ids) + i for p, i in zip(self.prompts, self.limits)]
        self.slots = self.sampler.allocate(min(self.sampler.max_batch, n), max(lengths), max(self.limits))
        self.slots.done[:] = True  # whatever an interrupted rollout left
        while self.refill():
            for i in range(self.stride):
                self.force_exits()
                self.sampler.run(self.sampler.pick, len(self.live), self.params)
                self.step += 1
                self.report_tokens()
                if i == self.stride - 1:
                    self.collect()
                if self.live:
                    self.sampler.run(self.sampler.forward, len(self.live))
                    self.slots.cache.longest += 1

    def refill(self) -> bool:
        """Gives the free slots to the next in the queue. False: there is nothing left to sample."""
        before = len(self.live)
        while len(self.live) < self.sampler.max_batch and (self.ready or self.waiting):
            if not self.ready:
                self.prefill()
            request, prompt = self.ready.popleft()
            request.begun = self.step
            uniforms = uniform_numbers(self.streams[request.prompt], request.sample, request.limit, self.params)
            self.slots.begin(len(self.live), prompt, request.limit, uniforms)
            self.live.append(request)
        if len(self.live) > before:
            self.find_longest()
        return bool(self.live)

    def find_longest(self) -> None:
        """Of the live sequences, as far as is known here. In between, it grows by a token per step."""
        self.slots.cache.longest = max((len(self.prompts[r.prompt].ids) + self.step - r.begun for r in self.live),
                                       default=0)

    def prefill(self) -> None:
        """Runs the next prompts, as many as PREFILL_TOKENS allow."""
        chosen, tokens = [], 0
        while self.waiting and (not chosen or tokens + len(self.prompts[self.waiting[0]].ids) <= PREFILL_TOKENS):
            chosen.append(self.waiting.popleft())
            tokens += len(self.prompts[chosen[-1]].ids)
        for i, prompt in zip(chosen, self.sampler.prefill([self.prompts[i] for i in chosen])):
            self.ready += [(Request(i, sample, self.limits[i]), prompt) for sample in range(self.params.n)]

    def force_exits(self) -> None:
        """Lets </think> be written where a thought has used up its budget."""
        if self.params.think_budget is None:
            return
        for slot, request in enumerate(self.live):
            count = self.step - request.begun
            over = count - self.params.think_budget
            if over < 0 or request.thought_ended or self.slots.done[slot]:
                continue
            verdict = forced_exit(self.sampler.tokenizer.decode(self.slots.ids[slot, :count].tolist()), over)
            request.thought_ended = verdict != "wait"
            if verdict == "force":
                tag = self.sampler.end_of_thought[:request.limit - count]
                self.slots.forced[slot, count:count + len(tag)] = torch.tensor(tag)

    def report_tokens(self) -> None:
        if self.on_token is not None:
            for slot, r in enumerate(self.live):
                self.on_token(r.prompt, r.sample, self.slots.ids[slot, :self.step - r.begun].tolist())

    def collect(self) -> None:
        """Takes out the sequences that have ended, and closes the holes with the last slots."""
        B, s = len(self.live), self.slots
        done = s.done[:B].nonzero().flatten()
        if not len(done):
            return
        counts = s.count[done].tolist()
        rows = [x[done, :max(counts)].tolist() for x in (s.ids, s.log_probs, s.forced)]
        done = done.tolist()
        for slot, count, *row in zip(done, counts, *rows):
            ids, log_probs, forced = (x[:count] for x in row)
            request, self.tokens = self.live[slot], self.tokens + count
            finished = completion(ids, log_probs, [i >= 0 for i in forced], self.sampler.tokenizer)
            self.finished[request.prompt, request.sample] = finished
            if self.on_completion is not None:
                self.on_completion(request.prompt, request.sample, finished)
        kept, ended = B - len(done), set(done)
        holes, last = [b for b in done if b < kept], [b for b in range(kept, B) if b not in ended]
        if holes:
            s.move(last, holes)
        for source, target in zip(last, holes):
            self.live[target] = self.live[source]
        del self.live[kept:]
        s.done[kept:] = True
        self.find_longest()
        self.bar.update(len(done))
        self.bar.set_postfix_str(f"{self.tokens / (time.perf_counter() - self.started):,.0f} tokens/s", refresh=False)


# --- The command ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleOptions(SamplingParams):
    """Sample answers to a prompt, text or with images."""
    model: str = option(str(MICRO_BASE), "model folder")
    prompt: str = option("", "the user's text; images stand before it")
    image: list[str] = option([], "image files")
    system: str | None = option(None, "system prompt (default: the template's)")
    json: bool = option(False, "print one JSON object")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))


def sample_once(sampler: Sampler, options: SampleOptions, images: ImageConfig) -> None:
    """Answers --prompt, as text or as the JSON object of the README; after Ctrl-C with the completions there are."""
    pictures = [load_image(path) for path in options.image]
    prompt = make_prompt(options.prompt, pictures, sampler.tokenizer, images, system=options.system)
    finished: dict[int, Completion] = {}
    started, interrupted = time.perf_counter(), False
    try:
        sampler.generate([prompt], options, progress=not options.json,
                         on_completion=lambda i, sample, completion: finished.update({sample: completion}))
    except KeyboardInterrupt:
        if not finished:
            raise
        interrupted = True
    seconds, completions = time.perf_counter() - started, [finished[sample] for sample in sorted(finished)]
    tokens = sum(len(c.ids) for c in completions)
    print("\n---\n".join(c.text for c in completions) if not options.json else json.dumps({
        "prompt_ids": prompt.ids,
        "completions": [{"ids": c.ids, "text": c.text, "finish_reason": c.finish_reason,
                         # a forced id may be outside top-k or top-p: JSON has no -Infinity
                         "log_probs": [p if p > float("-inf") else None for p in c.log_probs]} for c in completions],
        "usage": {"prompt_tokens": len(prompt.ids), "completion_tokens": tokens, "seconds": seconds,
                  "tokens_per_second": tokens / seconds}}))
    if interrupted:
        raise KeyboardInterrupt


def load_sampler(folder: str, device: str, dtype: str, **options) -> tuple[Sampler, ImageConfig]:
    """A model folder, ready to be sampled from. Text-only folders say nothing about images."""
    device, dtype = pick_device(device), None if dtype == "auto" else getattr(torch, dtype)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Qwen2_5_VL.from_pretrained(folder, device=device, dtype=dtype)
    limit_threads(model.config)
    images = ImageConfig.from_pretrained(folder) if model.config.vision is not None else ImageConfig()
    return Sampler(model, tokenizer, frozen=True, **options), images


def main(argv: list[str]) -> None:
    options = parse_options(SampleOptions, argv)
    if not options.prompt:
        raise InputError("--prompt is missing (tools/chat.py talks)")
    sampler, images = load_sampler(options.model, options.device, options.dtype, max_batch=options.max_batch)
    sample_once(sampler, options, images)


if __name__ == "__main__":
    run_command(main)
