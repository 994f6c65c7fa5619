"""Sampling: the batched engine that GRPO's rollouts and every evaluation use, and a chat.

    python sample.py --model micro/base                                              # chat; /image FILE, /reset, /quit
    python sample.py --model Qwen2.5-VL-7B-Instruct --image cat.png --prompt "What is this?" --temperature 0 --json

Shapes: B sequences that are being sampled, T prompt tokens, V vocabulary rows.
"""
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from data import ImageConfig, InputError, Prompt, Tokenizer, chat_prompt, load_image, make_prompt
from model import KVCache, Qwen2_5_VL, rope_positions
from training import MICRO_BASE, check_vocabulary, limit_threads, option, parse_options, pick_device, run_command

END_OF_THOUGHT = "</think>"
TAG_GRACE = 8  # tokens that a half-written </think> may still take when the think budget is used up
GREEDY_BELOW = 1e-5  # the hub's generation_config says "temperature": 1e-06 and means greedy


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The defaults sample from the model's own distribution, as RL must (no top-k, no top-p)."""
    max_new_tokens: int = 512
    temperature: float = 1.0          # 0: greedy
    top_p: float = 1.0                # 1: off
    top_k: int = 0                    # 0: off
    n: int = 1                        # completions per prompt
    seed: int = 0
    think_budget: int | None = None   # tokens until </think> is appended (the paper's forced exiting)


@dataclass
class Completion:
    """What was sampled behind one prompt."""
    ids: list[int] = field(default_factory=list)            # with the stop token, if one came
    log_probs: list[float] = field(default_factory=list)    # natural logs, under the distribution sampled from
    forced: list[bool] = field(default_factory=list)        # ids that the think budget wrote: no actions of the model
    text: str = ""                                          # without control tokens
    finish_reason: str = ""                                 # stop, length, or forced (stopped, after a forced exit)


class Generation:
    """A completion in the making."""

    def __init__(self, stream: tuple[int, ...], limit: int, params: SamplingParams):
        self.completion = Completion()
        self.limit = limit                    # new tokens at most
        self.pending: list[int] = []          # forced ids still to be written
        self.exit_settled = params.think_budget is None  # thinking has ended, by itself or by force
        generator = torch.Generator().manual_seed(hash((params.seed, *stream)) % 2**63)
        self.uniforms = torch.rand(limit, generator=generator)


def random_streams(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """What names each prompt's random stream: its content, and how many equal prompts stand before it. So what is
    sampled behind a prompt does not depend on the rest of the batch, and equal prompts still get different samples."""
    seen, streams = Counter(), []
    for prompt in prompts:
        key = zlib.crc32(torch.tensor(prompt.ids).numpy().tobytes())
        key = key if prompt.patches is None else zlib.crc32(prompt.patches.numpy().tobytes(), key)
        streams.append((key, seen[key]))
        seen[key] += 1
    return streams


def sampling_log_probs(logits: Tensor, params: SamplingParams, masked_ids: Tensor) -> Tensor:
    """Log-probs [B, V] of the distribution that is sampled from; greedy decoding reports the untempered one."""
    logits = logits.float().index_fill(-1, masked_ids, float("-inf"))
    if params.temperature > GREEDY_BELOW:
        logits = logits / params.temperature
        if params.top_k:
            kth = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if params.top_p < 1.0:
            probs, order = logits.softmax(-1).sort(-1, descending=True)
            outside = probs.cumsum(-1) - probs >= params.top_p  # the token that crosses top_p is still inside
            outside[:, 0] = False  # also at top_p 0
            logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits.log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: [B, V] and one uniform number per row -> ids [B]. Ids of probability 0 never come."""
    cdf = log_probs.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True)[:, 0]


class Sampler:
    """Samples completions for a list of prompts, text and images mixed, about `max_batch` sequences at a time (those of
    one prompt stay together). Raises InputError where the tokenizer has ids beyond the model's vocabulary."""

    def __init__(self, model: Qwen2_5_VL, tokenizer: Tokenizer, *, max_batch: int = 256):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.device = model.head_weight.device
        check_vocabulary(tokenizer, model.config)
        self.masked_ids = tokenizer.never_sampled(model.config.vocab_size).to(self.device)
        self.end_of_thought = tokenizer.encode(END_OF_THOUGHT)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, *, progress: bool = False,
                 on_token: Callable[[Completion], None] | None = None) -> list[list[Completion]]:
        """params.n completions of each prompt, in order; `check` says which prompts are refused.

        `on_token` is called with a completion (ids only) after each of its tokens.
        """
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {i + 1}")
        context, streams = self.model.config.max_position_embeddings, random_streams(prompts)
        # Prompts of like length share a batch: less padding in the prefill.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        size = max(1, self.max_batch // params.n)
        results: list[list[Completion]] = [[] for _ in prompts]
        with tqdm(total=len(prompts) * params.n, unit="seq", desc="sampling", disable=not progress, leave=False) as bar:
            for start in range(0, len(order), size):
                chosen = order[start:start + size]
                batch = [prompts[i] for i in chosen]
                limits = [min(params.max_new_tokens, context - len(p.ids)) for p in batch]
                sequences = [Generation((*streams[i], s), limit, params)
                             for i, limit in zip(chosen, limits) for s in range(params.n)]
                self.run(batch, sequences, params, bar, on_token)
                for j, sequence in enumerate(sequences):
                    results[chosen[j // params.n]].append(self.finish(sequence.completion))
        return results

    def check(self, prompt: Prompt, name: str) -> None:
        """Raises InputError for a prompt that leaves no room in the context, and images where the model takes none."""
        context = self.model.config.max_position_embeddings
        if len(prompt.ids) >= context:
            raise InputError(f"{name}: its {len(prompt.ids)} tokens do not fit the context of {context}")
        if prompt.grids and self.model.config.vision is None:
            raise InputError(f"{name}: this model has no vision tower: it takes no images")

    def prefill(self, prompts: list[Prompt], n: int, max_new_tokens: int) -> tuple[KVCache, Tensor, Tensor]:
        """Runs each prompt once. Returns cache, next position [B] and logits [B, V], each row n times over."""
        lengths = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        T = int(lengths.max())
        input_ids = torch.full((len(prompts), T), self.tokenizer.endoftext, device=self.device)
        for row, prompt in enumerate(prompts):
            input_ids[row, :len(prompt.ids)] = torch.tensor(prompt.ids)
        patches = [p.patches for p in prompts if p.patches is not None]
        grids = [grid for p in prompts for grid in p.grids]
        config, kind = self.model.config, self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.head_weight.dtype
        cache = KVCache(config, len(prompts), T + max_new_tokens, device=self.device, dtype=dtype)
        position_ids, next_position = rope_positions(input_ids, grids, config)
        hidden = self.model(input_ids, position_ids=position_ids, image_grid_thw=grids or None, cache=cache,
                            lengths=lengths, pixel_values=torch.cat(patches).to(self.device) if patches else None)
        hidden = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        next_position = next_position - (T - lengths)  # rope_positions counts to the padded end
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(n)
        return cache.select(rows), next_position[rows], self.model.logits(hidden)[rows]

    def run(self, prompts: list[Prompt], sequences: list[Generation], params: SamplingParams, bar: tqdm,
            on_token: Callable[[Completion], None] | None) -> None:
        """Samples one batch to its end: a token for every live sequence per step."""
        steps = max(s.limit for s in sequences)
        cache, position, logits = self.prefill(prompts, params.n, steps)
        uniforms = torch.stack([torch.nn.functional.pad(s.uniforms, (0, steps - s.limit)) for s in sequences])
        uniforms = uniforms.to(self.device)
        rows = list(sequences)  # row b of the cache belongs to rows[b]
        done = [False] * len(rows)
        for step in range(steps):
            log_probs = sampling_log_probs(logits, params, self.masked_ids)
            greedy = params.temperature <= GREEDY_BELOW
            ids = log_probs.argmax(-1) if greedy else draw(log_probs, uniforms[:, step])
            ids = self.force(ids, rows, params)
            chosen = log_probs.gather(-1, ids[:, None])[:, 0].tolist()
            for b, token in enumerate(ids.tolist()):
                if not done[b]:
                    done[b] = self.accept(rows[b], token, chosen[b])
                    bar.update(done[b])
                    if on_token:
                        on_token(rows[b].completion)
            if all(done):
                return
            if sum(done) * 2 >= len(rows):  # drop the finished rows once they are half of the batch
                live = torch.tensor([b for b in range(len(rows)) if not done[b]], device=self.device)
                cache, position, ids, uniforms = cache.select(live), position[live], ids[live], uniforms[live]
                rows, done = [rows[b] for b in live.tolist()], [False] * len(live)
            position_ids = position.expand(3, -1)[..., None]                                                # [3, B, 1]
            logits = self.model.logits(self.model(ids[:, None], position_ids=position_ids, cache=cache)[:, 0])
            position = position + 1

    def force(self, ids: Tensor, rows: list[Generation], params: SamplingParams) -> Tensor:
        """Puts pending ids of forced exits in the place of what was sampled."""
        if params.think_budget is None:
            return ids
        forced = {b: s.pending[0] for b, s in enumerate(rows) if self.must_force(s, params)}
        if forced:
            ids = ids.clone()
            ids[list(forced)] = torch.tensor(list(forced.values()), device=ids.device)
        return ids

    def must_force(self, sequence: Generation, params: SamplingParams) -> bool:
        """True where the next id is forced. At the think budget this decides, on the decoded text (</think> is several
        tokens and merges with its neighbours), whether the tag has come, is being written, or has to be appended."""
        length = len(sequence.completion.ids)
        if not sequence.exit_settled and length >= params.think_budget:
            text = self.tokenizer.decode(sequence.completion.ids)
            half_written = any(text.endswith(END_OF_THOUGHT[:n]) for n in range(1, len(END_OF_THOUGHT)))
            if END_OF_THOUGHT in text:
                sequence.exit_settled = True
            elif not half_written or length >= params.think_budget + TAG_GRACE:
                sequence.exit_settled, sequence.pending = True, list(self.end_of_thought)
        return bool(sequence.pending)

    def accept(self, sequence: Generation, token: int, log_prob: float) -> bool:
        """Appends a token; true if it ends the sequence."""
        completion = sequence.completion
        is_forced = bool(sequence.pending)
        if is_forced:
            sequence.pending.pop(0)
        completion.ids.append(token)
        completion.log_probs.append(log_prob)
        completion.forced.append(is_forced)
        if token in self.tokenizer.stop_ids:
            completion.finish_reason = "forced" if any(completion.forced) else "stop"
        elif len(completion.ids) >= sequence.limit:
            completion.finish_reason = "length"
        return bool(completion.finish_reason)

    def finish(self, completion: Completion) -> Completion:
        completion.text = self.tokenizer.decode(completion.ids)
        return completion


@dataclass
class SampleOptions:
    """Sample from a model folder; without --prompt, chat with it."""
    model: str = option(str(MICRO_BASE), "model folder")
    prompt: str | None = option(None, "the user's text; images stand before it")
    image: list[str] = option([], "image files")
    system: str | None = option(None, "system prompt (default: the template's)")
    max_new_tokens: int = option(512, "response length limit", low=1)
    temperature: float = option(1.0, "0 is greedy", low=0.0)
    top_p: float = option(1.0, "nucleus sampling", low=0.0, high=1.0)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", low=0)
    n: int = option(1, "completions", low=1)
    seed: int = option(0, "of the random stream", low=0)
    think_budget: int | None = option(None, "tokens after which </think> is appended if it has not come", low=0)
    json: bool = option(False, "print one JSON object")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.n, self.seed,
                              self.think_budget)


def sample_once(sampler: Sampler, options: SampleOptions, images: ImageConfig) -> None:
    """Answers --prompt, as text or as the JSON object of the README."""
    pictures = [load_image(path) for path in options.image]
    prompt = make_prompt(options.prompt, pictures, sampler.tokenizer, images, system=options.system)
    started = time.perf_counter()
    completions = sampler.generate([prompt], options.sampling_params(), progress=not options.json)[0]
    seconds = time.perf_counter() - started
    if not options.json:
        print("\n---\n".join(c.text for c in completions))
        return
    tokens = sum(len(c.ids) for c in completions)
    print(json.dumps({
        "prompt_ids": prompt.ids,
        "completions": [{"ids": c.ids, "text": c.text, "finish_reason": c.finish_reason,
                         # a forced id may be outside top-k or top-p: JSON has no -Infinity
                         "log_probs": [p if p > float("-inf") else None for p in c.log_probs]} for c in completions],
        "usage": {"prompt_tokens": len(prompt.ids), "completion_tokens": tokens, "seconds": seconds,
                  "tokens_per_second": tokens / seconds}}))


def chat(sampler: Sampler, options: SampleOptions, image_config: ImageConfig) -> None:
    """A conversation in the terminal: the answer appears as it is sampled. `/image FILE` puts an image before the next
    message, `/reset` forgets everything, `/quit` or Ctrl-D ends."""
    print("/image FILE adds an image to your next message, /reset starts again, /quit ends.", file=sys.stderr)
    sys.stdin.reconfigure(errors="replace")
    messages, images, pending = [], [], []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        try:
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/reset":
                messages, images, pending = [], [], []
            elif command == "/image" and argument:
                pending.append(load_image(argument.strip()))
            elif command.startswith("/"):
                raise InputError(f"{command} is not a command, or lacks its FILE")
            elif line:
                system = [{"role": "system", "content": options.system}] if options.system is not None else []
                content = [{"type": "image"}] * len(pending) + [{"type": "text", "text": line}]
                turn = {"role": "user", "content": content}
                prompt = chat_prompt([*system, *messages, turn], images + pending, sampler.tokenizer, image_config)
                answer = stream(sampler, prompt, options.sampling_params())
                messages += [turn, {"role": "assistant", "content": answer}]
                images, pending = images + pending, []
        except InputError as error:  # a bad file or a full context: say so, and go on
            print(f"error: {error}", file=sys.stderr)


def stream(sampler: Sampler, prompt: Prompt, params: SamplingParams) -> str:
    """Samples one answer, printing it as far as its text is certain (a character may take several tokens)."""
    shown = 0

    def show(completion: Completion) -> None:
        nonlocal shown
        text = sampler.tokenizer.decode(completion.ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)

    completion = sampler.generate([prompt], SamplingParams(**{**vars(params), "n": 1}), on_token=show)[0][0]
    print(completion.text[shown:], flush=True)
    return completion.text


def load_sampler(folder: str, device: str, dtype: str, **options) -> tuple[Sampler, ImageConfig]:
    """A model folder, ready to be sampled from. Text-only folders say nothing about images."""
    device, dtype = pick_device(device), None if dtype == "auto" else getattr(torch, dtype)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Qwen2_5_VL.from_pretrained(folder, device=device, dtype=dtype)
    limit_threads(model.config)
    images = ImageConfig.from_pretrained(folder) if model.config.vision is not None else ImageConfig()
    return Sampler(model, tokenizer, **options), images


def main(argv: list[str]) -> None:
    options = parse_options(SampleOptions, argv)
    if options.prompt is None and (options.json or options.image):
        raise InputError("--json and --image need a --prompt")
    sampler, images = load_sampler(options.model, options.device, options.dtype)
    if options.prompt is None:
        chat(sampler, options, images)
    else:
        sample_once(sampler, options, images)


if __name__ == "__main__":
    run_command(main)
