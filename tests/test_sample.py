import contextlib
import copy
import gc
import io
import math
import random
import re
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sample as engine_module
import tiny
from data import InputError, Prompt, Tokenizer
from data.completions import random_numbers, random_streams
from hub.config import Config
from kernels import draw, widest_float
from kernels import sampling_log_probs as kernel_log_probs
from model import KVCache, PromptCache, Qwen2_5_VL, prefill_memory, slots_that_fit
from sample import Completion, Rollout, Sampler, SamplingParams, Slots, load_sampler, sample_plainly
from tools.chat import stream

torch.set_num_threads(1)  # tiny products: threads would only wait for one another
IDS = tiny.special_ids()
STOPS = (IDS["im_end"], IDS["endoftext"])
NEVER = [
    *(IDS[name] for name in IDS if name.startswith(("vision", "image", "video"))),
    *range(tiny.KNOWN_IDS, tiny.VOCAB_ROWS),
]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> Sampler:
    folder = tiny.make_folder(tmp_path_factory.mktemp("vl"), "vl")
    return Sampler(Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def tokenizer(sampler) -> Tokenizer:
    return sampler.tokenizer


def sampling_log_probs(logits: Tensor, params: SamplingParams, masked_ids: Tensor) -> Tensor:
    return kernel_log_probs(
        logits,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        masked_ids=masked_ids,
    )


class Biased(nn.Module):
    """A model with some logits raised."""

    lm_head = None  # the head is the model's

    def __init__(self, model: Qwen2_5_VL, bias: dict[int, float]):
        super().__init__()
        self.model, self.config = model, model.config
        self.bias = torch.zeros(model.config.vocab_size)
        self.bias[list(bias)] = torch.tensor(list(bias.values()))

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    def forward(self, *args, **options) -> Tensor:
        return self.model(*args, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden) + self.bias


class Scripted(nn.Module):
    """A model that says script[p] behind position p, with probability 1 / (1 + (rows - 1) / e^5);
    elsewhere `filler`.

    Prompts of different lengths use different stretches of positions, so every row of a batch can
    have its own lines.
    """

    def __init__(self, script: dict[int, int], filler: int):
        super().__init__()
        fields = {
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "hidden_size": 1,
            "vision": None,
            "vocab_size": tiny.VOCAB_ROWS,
            "max_position_embeddings": 512,
        }
        self.config, self.head_weight = SimpleNamespace(**fields), torch.zeros(1)
        self.script, self.filler = script, filler

    def forward(
        self, input_ids: Tensor, *, position_ids: Tensor, cache: KVCache | PromptCache, **_
    ) -> Tensor:
        cache.append(0, *torch.zeros(2, *input_ids.shape, 1, 2))
        return position_ids[0, :, :, None].expand(*input_ids.shape, 1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        ids = [self.script.get(int(p), self.filler) for p in hidden[:, 0]]
        return 5.0 * torch.nn.functional.one_hot(torch.tensor(ids), tiny.VOCAB_ROWS)


class NoisePrompt(Prompt):
    """A prompt whose images are noise, and no pictures."""

    def pixel_values(self) -> Tensor | None:
        return tiny.patches(self.grids, self.images[0]) if self.grids else None


def noise_prompt(ids: list[int], grids: list, seed: int) -> Prompt:
    return NoisePrompt(ids, [seed] * len(grids), grids)


def prompts() -> list[Prompt]:
    """Ragged: text and images mixed, one with two images."""
    square, cut, strip = (tiny.GRIDS[name] for name in ("square", "cut", "strip"))
    image_lists = [[], [cut], [], [square, strip], [], []]
    lengths = [9, 14, 31, 12, 1, 20]
    return [
        noise_prompt(tiny.row(40 + i, length, grids), grids, i)
        for i, (length, grids) in enumerate(zip(lengths, image_lists))
    ]


def full_log_probs(model, prompt: Prompt, ids: list[int], params: SamplingParams) -> Tensor:
    """The log-probs [len(ids)] of ids behind the prompt from one forward without a cache."""
    with torch.no_grad():
        hidden = model(
            torch.tensor([prompt.ids + ids]),
            pixel_values=prompt.pixel_values(),
            image_grid_thw=prompt.grids or None,
        )
        logits = model.logits(hidden)[0, len(prompt.ids) - 1 : -1]
    return sampling_log_probs(logits, params, torch.tensor(NEVER)).gather(
        -1, torch.tensor(ids)[:, None]
    )[:, 0]


def assert_same(one: list, other: list) -> None:
    """Two results of generate: the same ids, log-probs within 1e-5."""
    assert len(one) == len(other)
    for a, b in zip(sum(one, []), sum(other, []), strict=True):
        assert (a.ids, a.forced, a.text, a.finish_reason) == (
            b.ids,
            b.forced,
            b.text,
            b.finish_reason,
        )
        torch.testing.assert_close(
            torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=1e-5, rtol=1e-6
        )


def generate_plainly(
    model: Qwen2_5_VL, tokenizer: Tokenizer, prompts: list[Prompt], params: SamplingParams
) -> list[list[Completion]]:
    """What `Sampler.generate` must give: one sequence after the other, by definition."""
    groups = []
    for prompt, number in zip(prompts, random_streams(prompts)):
        groups.append([])
        for i in range(params.n):
            rng = random_numbers(params.seed, number, i)
            groups[-1].append(sample_plainly(model, tokenizer, prompt, params, rng))
    return groups


def scripted(
    tokenizer: Tokenizer, *lines: str | list[int], start: int = 10
) -> tuple[Sampler, list[Prompt]]:
    """A sampler that says the lines, and behind them "." for ever; and the prompt for each."""
    script, texts = {}, []
    for i, line in enumerate(lines):
        length = start + 100 * i
        ids = tokenizer.encode(line) if isinstance(line, str) else line
        script |= {length - 1 + j: token for j, token in enumerate(ids)}
        texts.append(Prompt([5] * length))
    return Sampler(Scripted(script, tokenizer.encode(".")[0]), tokenizer), texts


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte: another spelling than the tokenizer's own where that merges."""
    return [token for byte in text for token in tokenizer.encode(byte)]


# --- The engine ---


@pytest.mark.parametrize(
    "params",
    [SamplingParams(24, 0.0), SamplingParams(24, 1.0, n=2), SamplingParams(24, 0.7, top_k=20)],
    ids=["greedy", "T=1", "T=0.7 top-k"],
)
def test_cached_log_probs_equal_those_of_one_forward_without_a_cache(sampler, params):
    for prompt, group in zip(prompts(), sampler.generate(prompts(), params), strict=True):
        assert len(group) == params.n
        for completion in group:
            assert len(completion.ids) == len(completion.log_probs) == len(completion.forced)
            wanted = full_log_probs(sampler.model, prompt, completion.ids, params)
            torch.testing.assert_close(
                torch.tensor(completion.log_probs), wanted, atol=1e-5, rtol=0
            )


def test_greedy_takes_the_argmax_of_one_forward_without_a_cache(sampler):
    found = sampler.generate(prompts(), SamplingParams(12, 0.0))
    for prompt, [completion] in zip(prompts(), found, strict=True):
        with torch.no_grad():
            hidden = sampler.model(
                torch.tensor([prompt.ids + completion.ids]),
                pixel_values=prompt.pixel_values(),
                image_grid_thw=prompt.grids or None,
            )
        logits = sampler.model.logits(hidden)[0, len(prompt.ids) - 1 : -1].index_fill(
            -1, torch.tensor(NEVER), -math.inf
        )
        assert completion.ids == logits.argmax(-1).tolist()


def small_prefills(monkeypatch, tokens: int) -> None:
    monkeypatch.setattr("sample.PREFILL_TOKENS", tokens)


def random_prompts(rng: random.Random) -> list[Prompt]:
    """One to four, of very different lengths, some with images."""
    out = []
    for _ in range(rng.randint(1, 4)):
        grids = rng.sample(list(tiny.GRIDS.values()), rng.choice([0, 0, 1, 2]))
        seed = rng.randrange(1000)
        out.append(noise_prompt(tiny.row(seed, rng.choice([1, 3, 8, 20, 40]), grids), grids, seed))
    return out + rng.sample(out, rng.randint(0, 1))  # sometimes one twice


@pytest.mark.parametrize("seed", range(60))
def test_any_schedule_gives_what_the_plain_loop_gives(sampler, seed, monkeypatch):
    """Slots, lengths, stops, images, groups, budgets and distributions at random."""
    rng = random.Random(seed)
    bias = {
        IDS["im_end"]: rng.choice([-9.0, 1.0, 2.5, 4.0]),
        IDS["endoftext"]: rng.choice([0.0, 2.0]),
    }
    monkeypatch.setattr(
        sys.modules["kernels.linear"], "SMALLEST", rng.choice([0, 2**17])
    )  # blocked or not
    engine = Sampler(
        Biased(sampler.model, bias), sampler.tokenizer, max_batch=rng.choice([1, 2, 3, 5, 8, 64])
    )
    small_prefills(monkeypatch, rng.choice([1, 30, 100, 4096]))
    for _ in range(rng.randint(1, 2)):
        batch = random_prompts(rng)
        params = SamplingParams(
            rng.choice([1, 2, 7, 16]),
            rng.choice([0.0, 0.7, 1.0, 1.0]),
            rng.choice([1.0, 0.9]),
            rng.choice([0, 20]),
            rng.randint(1, 3),
            rng.randrange(100),
            rng.choice([None, None, 0, 3, 6]),
        )
        assert_same(
            engine.generate(batch, params),
            generate_plainly(engine.model, engine.tokenizer, batch, params),
        )


def test_a_slot_is_refilled_as_soon_as_it_is_free(tokenizer, monkeypatch):
    """In two slots, short responses follow one another beside a long one."""
    engine, batch = scripted(
        tokenizer, "x" * 30, *([*tokenizer.encode("ab"), IDS["im_end"]] for _ in range(3))
    )
    engine.max_batch, steps, forward = 2, [], Rollout.forward
    monkeypatch.setattr(Rollout, "forward", lambda self, B: steps.append(B) or forward(self, B))
    results = engine.generate(batch, SamplingParams(30, 0.0))
    assert [len(c.ids) for [c] in results] == [30, 3, 3, 3]
    assert (
        len(steps) <= 30 + 3 and sum(steps) <= 30 + 3 * 3
    )  # no row is run that is not sampled from


def test_a_prompt_is_run_once_for_all_its_samples(sampler, monkeypatch):
    """And its images pass the tower once, however few slots there are."""
    calls, images = [], []
    model, visual = sampler.model, sampler.model.visual.forward
    monkeypatch.setattr(
        model.visual, "forward", lambda x, grids: images.append(len(grids)) or visual(x, grids)
    )

    class Counted(Biased):
        def forward(self, input_ids: Tensor, **options) -> Tensor:
            calls.append(input_ids.shape)
            return super().forward(input_ids, **options)

    engine = Sampler(Counted(model, {IDS["im_end"]: 2.0}), sampler.tokenizer, max_batch=3)
    results = engine.generate(prompts(), SamplingParams(8, n=5))
    assert [len(group) for group in results] == [5] * 6
    prefills = [shape for shape in calls if shape[1] > 1]
    assert prefills == [(1, sum(len(p.ids) for p in prompts()))]  # packed: no padding
    assert sum(images) == sum(len(p.grids) for p in prompts())


def test_images_become_patches_when_their_prompt_is_run(sampler, monkeypatch):
    """Prompts that wait hold none: each is preprocessed once, right before its own pass."""
    events = []
    patches, prefill = NoisePrompt.pixel_values, Rollout.prefill
    monkeypatch.setattr(
        NoisePrompt, "pixel_values", lambda self: events.append(len(self.ids)) or patches(self)
    )
    monkeypatch.setattr(
        Rollout, "prefill", lambda self, chosen: events.append("pass") or prefill(self, chosen)
    )
    small_prefills(monkeypatch, 1)
    batch = [prompts()[3], prompts()[1]]
    Sampler(sampler.model, sampler.tokenizer, max_batch=1).generate(batch, SamplingParams(2))
    assert events == ["pass", len(batch[1].ids), "pass", len(batch[0].ids)]


def test_without_stop_ids_every_completion_has_its_full_length(sampler):
    model = Biased(sampler.model, {IDS["im_end"]: 9.0})
    endless = Sampler(model, sampler.tokenizer, stop_ids=())
    lengths = [len(c.ids) for [c] in endless.generate(prompts(), SamplingParams(7))]
    assert lengths == [7] * 6
    stopped = Sampler(model, sampler.tokenizer).generate(prompts(), SamplingParams(7))
    assert min(len(c.ids) for [c] in stopped) < 7


def test_what_a_callback_takes_is_not_kept(sampler):
    params, taken = SamplingParams(6, n=2), {}
    kept = sampler.generate(prompts(), params)
    result = sampler.generate(
        prompts(), params, on_completion=lambda i, k, done: taken.update({(i, k): done})
    )
    assert result == []
    assert_same(kept, [[taken[i, k] for k in range(2)] for i in range(6)])


def test_streams_name_prompts_wherever_they_stand(sampler):
    """A prompt gets the same samples again under its number, and others under another."""
    batch, params = prompts()[:3], SamplingParams(12, n=2)
    first = sampler.generate(batch, params, streams=[7, 8, 9])
    assert_same(sampler.generate(batch[::-1], params, streams=[9, 8, 7]), first[::-1])
    other = sampler.generate(batch, params, streams=[1, 2, 3])
    assert all(a.ids != b.ids for a, b in zip(sum(first, []), sum(other, []), strict=True))


def test_random_streams_are_the_same_in_every_python():
    assert random_streams([Prompt([1, 2]), Prompt([3]), Prompt([1, 2])]) == [
        2944577651,
        1308727893,
        3632627941,
    ]
    assert random_numbers(5, 7, 1).random() == 0.44038043253204584


def test_ctrl_c_keeps_what_is_finished_and_leaves_a_sampler_that_works(tokenizer, monkeypatch):
    engine, batch = scripted(tokenizer, [*tokenizer.encode("ab"), IDS["im_end"]], "x" * 50)
    count, finished, forward = [], [], Rollout.forward

    def interrupted(self, B):
        count.append(B)
        if len(count) == 10:
            raise KeyboardInterrupt
        forward(self, B)

    monkeypatch.setattr(Rollout, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(
            batch, SamplingParams(40, 0.0), on_completion=lambda *done: finished.append(done)
        )
    [(prompt, sample, done)] = finished
    assert (prompt, sample, done.text) == (0, 0, "ab")
    monkeypatch.setattr(Rollout, "forward", forward)
    assert [c.text for [c] in engine.generate(batch, SamplingParams(40, 0.0))] == ["ab", "x" * 40]


@pytest.fixture
def captured(monkeypatch) -> list:
    """The graphs of every rollout."""
    graphs = []

    class Recorded(engine_module.Graphs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            graphs.append(self.captured)

    monkeypatch.setattr(engine_module, "Graphs", Recorded)
    return graphs


def assert_close_to_plain(engine: Sampler, plain_model: Qwen2_5_VL, params: SamplingParams) -> None:
    results = engine.generate(prompts(), params)
    wanted = generate_plainly(plain_model, engine.tokenizer, prompts(), params)
    for a, b in zip(sum(results, []), sum(wanted, []), strict=True):
        assert a.ids == b.ids and a.forced == b.forced
        torch.testing.assert_close(
            torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=1e-4, rtol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.parametrize("max_batch", [3, 64])
def test_gpu_gives_what_the_plain_loop_gives(tmp_path, max_batch, captured):
    """Also where CUDA graphs are replayed, and where more slots are run than are in use."""
    folder = tiny.make_folder(tmp_path, "vl")
    model, tokenizer = Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = Qwen2_5_VL.from_pretrained(folder, device="cuda")
    engine = Sampler(on_gpu, tokenizer, max_batch=max_batch)
    for params in (
        SamplingParams(24, 0.0),
        SamplingParams(24, 1.0, n=4),
        SamplingParams(24, 1.0, n=3, think_budget=5),
    ):
        assert_close_to_plain(engine, model, params)
    assert captured and all(captured)


@pytest.mark.gpu
def test_gpu_rollouts_follow_the_weights(tmp_path, captured):
    """A rollout, an optimiser's step in place, a rollout: no graph has kept the old weights."""
    folder = tiny.make_folder(tmp_path, "vl")
    model, tokenizer = Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = Qwen2_5_VL.from_pretrained(folder, device="cuda")
    engine, params = Sampler(on_gpu, tokenizer), SamplingParams(24, 1.0, n=4)
    assert_close_to_plain(engine, model, params)
    optimizer = torch.optim.SGD(on_gpu.parameters(), lr=0.1)
    on_gpu.logits(on_gpu(torch.tensor([tiny.row(0, 20)], device="cuda"))).square().mean().backward()
    optimizer.step()
    model.load_state_dict({key: value.cpu() for key, value in on_gpu.state_dict().items()})
    assert_close_to_plain(engine, model, params)
    assert captured and all(captured)


class EagerGraphs(engine_module.Graphs):
    """Runs everything as it is, but in sizes that are rounded up as on a GPU."""

    keys: list[tuple] = []

    def __init__(self, enabled: bool):
        super().__init__(enabled=False)
        self.enabled = True

    def run(self, key, work):
        self.keys.append(key)
        work()


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "a new copy"])
def test_gpu_graphs_with_an_optimiser_step_between_rollouts(
    tmp_path, captured, monkeypatch, in_place
):
    """As in GRPO: the weights change in place (one process), or every rollout has a copy of its own
    (several). The graphs sample what is sampled without graphs."""
    folder = tiny.make_folder(tmp_path, "vl")
    model = Qwen2_5_VL.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    tokenizer, params = Tokenizer.from_pretrained(folder), SamplingParams(24, 1.0, n=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    engine, rollouts = Sampler(model, tokenizer), []
    for _ in range(3):
        if not in_place:
            engine = Sampler(copy.deepcopy(model), tokenizer)
        rollouts.append(engine.generate(prompts(), params))
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "Graphs", EagerGraphs)
            wanted = Sampler(model, tokenizer).generate(prompts(), params)
        assert_same(rollouts[-1], wanted)
        ids = torch.tensor([tiny.row(0, 20)], device="cuda")
        model.logits(model(ids)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(captured) == 3 and all(captured)
    texts = [[completion.ids for [completion, *_] in rollout] for rollout in rollouts]
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.gpu
def test_gpu_memory_is_given_back_after_a_rollout(tmp_path):
    folder = tiny.make_folder(tmp_path, "vl")
    model = Qwen2_5_VL.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    engine, used = Sampler(model, Tokenizer.from_pretrained(folder)), []
    for _ in range(3):
        engine.generate(prompts(), SamplingParams(24, 1.0, n=4))
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[1] == used[2]


@pytest.fixture
def pretended_gpu(monkeypatch) -> list:
    """Graphs that run everything eagerly, but have sizes rounded up as on a GPU."""
    monkeypatch.setattr(EagerGraphs, "keys", [])
    monkeypatch.setattr(engine_module, "Graphs", EagerGraphs)
    return EagerGraphs.keys


@pytest.mark.parametrize("max_batch", [1, 3, 6, 64])
def test_rounded_sizes_give_what_the_plain_loop_gives(sampler, max_batch, pretended_gpu):
    """As on a GPU: more slots are run than are in use, on more keys than any has."""
    engine = Sampler(
        Biased(sampler.model, {IDS["im_end"]: 2.5}), sampler.tokenizer, max_batch=max_batch
    )
    for params in (SamplingParams(24, 0.0), SamplingParams(24, 1.0, n=3, think_budget=5)):
        wanted = generate_plainly(engine.model, engine.tokenizer, prompts(), params)
        assert_same(engine.generate(prompts(), params), wanted)
    assert len(set(pretended_gpu)) < 20


# --- Memory ---


def test_slots_that_fit():
    """The 7B's slots of 4,608 tokens: keys and values x 28 layers x 4 heads x 128 x 2 bytes."""
    shape = {"num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 0}
    size = KVCache.bytes_per_slot(SimpleNamespace(**shape), 4608, torch.bfloat16)
    assert size == 4608 * 57_344
    assert slots_that_fit(round(25.8 * 2**30), size, 256) == 104
    assert slots_that_fit(round(25.8 * 2**30), size, 64) == 64
    assert slots_that_fit(size, size, 64) == 1
    assert slots_that_fit(size - 1, size, 64) == 0
    assert slots_that_fit(-5, size, 64) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_has_the_bytes_of_the_real_cache(sampler, dtype):
    config = sampler.model.config
    cache = KVCache(config, 3, 50, dtype=dtype)
    row = 4 * config.vocab_size  # in float32
    size = KVCache.bytes_per_slot(config, 50, dtype)
    assert 3 * (size - 16 * row) == cache.keys.nbytes + cache.values.nbytes


@pytest.fixture
def free_bytes(monkeypatch) -> Callable:
    """Sets what is free, as on a GPU. As in a process that has said nothing about it yet."""
    monkeypatch.setattr(Rollout, "said", False)
    return lambda size: monkeypatch.setattr(engine_module, "free_memory", lambda device: size)


def test_memory_decides_how_many_slots_there_are(sampler, free_bytes, monkeypatch, capsys):
    """The samples stay the same, and it is said once."""
    sizes, make = [], Slots.__init__

    def recorded(self, engine: Sampler, size: int, max_length: int) -> None:
        sizes.append(size)
        make(self, engine, size, max_length)

    monkeypatch.setattr(Slots, "__init__", recorded)
    params, config = SamplingParams(12, n=4), sampler.model.config
    wanted = sampler.generate(prompts(), params)
    slot = KVCache.bytes_per_slot(config, 108, torch.float32)  # 96 tokens of prompt, and 12
    reserve = prefill_memory(config, engine_module.PREFILL_TOKENS, torch.float32)
    for count in (5, 2):
        free_bytes(reserve + count * slot + slot // 2)
        assert_same(sampler.generate(prompts(), params), wanted)
    free_bytes(reserve + 100 * slot)
    assert_same(sampler.generate(prompts(), params), wanted)
    assert sizes == [24, 5, 2, 24]
    said = capsys.readouterr().err.splitlines()
    assert said == ["sampling in 5 slots of 108 tokens: 1.1 GiB are free"]


def test_too_little_memory_for_one_slot_is_one_line(sampler, free_bytes):
    free_bytes(2**29)
    line = (
        "sampling 108 tokens in a single slot takes 1.1 GiB, and 0.5 GiB are free; what helps: a "
    )
    with pytest.raises(InputError, match=re.escape(line) + "lower --max-new-tokens"):
        sampler.generate(prompts(), SamplingParams(12))
    assert sampler.generate([], SamplingParams(12)) == []


def test_long_prompts_and_images_need_a_larger_reserve(tmp_path):
    text, vision = (
        Config.from_pretrained(tiny.make_folder(tmp_path / name, name)) for name in ("text", "vl")
    )
    sizes = [prefill_memory(text, tokens, torch.bfloat16) for tokens in (0, 1000, 2000)]
    assert sizes[0] == 2**30 and sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
    assert prefill_memory(text, 1000, torch.float32) - 2**30 == 2 * (sizes[1] - 2**30)
    assert prefill_memory(vision, 1000, torch.bfloat16) > sizes[1]


def test_nothing_of_a_rollout_stays_alive(sampler, monkeypatch):
    """Cache, states and graphs go at once, not when garbage is collected: the update needs their
    memory. Nor do completions keep them."""
    alive, shared = [], sampler.masked_ids
    kinds = (engine_module.Graphs, KVCache, PromptCache, Rollout, Slots)
    for kind in kinds:

        def make(self, *args, original=kind.__init__, **options):
            original(self, *args, **options)
            parts = [x for x in vars(self).values() if isinstance(x, Tensor)]
            alive.extend(weakref.ref(part) for part in (self, *parts) if part is not shared)

        monkeypatch.setattr(kind, "__init__", make)
    gc.collect()
    gc.disable()
    try:
        kept = sampler.generate(prompts(), SamplingParams(6, n=2))
        sampler.generate(
            prompts(), SamplingParams(6, n=2), on_completion=lambda *done: kept.append(done)
        )
        assert len(alive) > 20 and [ref for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_a_prompts_keys_and_values_are_held_once(sampler):
    config = sampler.model.config
    cache = PromptCache(config, 9)
    for layer in range(config.num_hidden_layers):
        k = torch.randn(2, 1, 9, config.num_key_value_heads, config.head_dim)
        cache.append(layer, *k)
    for keys, values in cache.split([4, 5]):
        assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
        assert values.untyped_storage().data_ptr() == cache.values.untyped_storage().data_ptr()
    assert torch.equal(keys[-1], k[0, 0, 4:].transpose(0, 1))


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph and torch.cuda.graph on a machine without a GPU."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_graph_is_kept_only_once_it_is_captured(monkeypatch):
    @contextlib.contextmanager
    def capture(graph, pool):
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphs, calls = engine_module.Graphs(enabled=True), []

    def work():
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt

    graphs.run(("key",), work)  # eagerly
    with pytest.raises(KeyboardInterrupt):
        graphs.run(("key",), work)  # interrupted in its capture
    assert not graphs.captured
    graphs.run(("key",), work)
    graphs.run(("key",), work)
    assert len(calls) == 3 and graphs.captured[("key",)].replays == 2


def test_text_only_model(tmp_path):
    sampler, _ = load_sampler(str(tiny.make_folder(tmp_path, "text")), "cpu", "float32")
    batch, params = [Prompt(tiny.row(i, 5 + 3 * i)) for i in range(3)], SamplingParams(10)
    assert_same(
        sampler.generate(batch, params), [sampler.generate([prompt], params)[0] for prompt in batch]
    )
    with pytest.raises(InputError, match="takes no images"):
        sampler.generate([prompts()[1]], params)


def test_completions_differ_and_the_seed_reproduces_them(sampler):
    def ids(**options):
        return [c.ids for c in sampler.generate(prompts()[:1], SamplingParams(16, **options))[0]]

    first = ids(n=4, seed=7)
    assert len({tuple(i) for i in first}) == 4
    assert ids(n=4, seed=7) == first and ids(n=2, seed=7) == first[:2]
    assert not {tuple(i) for i in ids(n=4, seed=8)} & {tuple(i) for i in first}
    assert len({tuple(i) for i in ids(n=3, temperature=0.0)}) == 1


def test_on_token_sees_every_token_once(sampler):
    seen: dict[tuple[int, int], list] = {}
    model = Biased(sampler.model, {IDS["im_end"]: 2.5})
    results = Sampler(model, sampler.tokenizer, max_batch=5).generate(
        prompts(),
        SamplingParams(20, n=2),
        on_token=lambda i, sample, ids: seen.setdefault((i, sample), []).append(ids),
    )
    assert len(seen) == 12
    for (i, sample), steps in seen.items():
        ids = results[i][sample].ids
        assert steps == [ids[: n + 1] for n in range(len(ids))]


def test_no_prompts_no_completions(sampler):
    assert sampler.generate([], SamplingParams(4)) == []


# --- The distribution ---

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.5, 0.0, 3.0], [0.0, 0.1, 0.2, 0.3, 0.4, 9.0]])
NONE = torch.tensor([], dtype=torch.long)


def oracle(
    logits: list[float], temperature: float, top_k: int, top_p: float, masked: list[int]
) -> list[float]:
    """Probabilities by the definitions, in plain Python: the k largest; of these the fewest, from
    the largest on, that hold at least top_p together; renormalised."""
    weight = {i: math.exp(x / temperature) for i, x in enumerate(logits) if i not in masked}
    kept = sorted(weight, key=weight.get, reverse=True)[: top_k or None]
    total, held, nucleus = sum(weight[i] for i in kept), 0.0, []
    for i in kept:
        if not nucleus or held < top_p:
            nucleus.append(i)
            held += weight[i] / total
    total = sum(weight[i] for i in nucleus)
    return [weight[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize(
    "top_k, top_p",
    [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.9), (0, 0.5), (0, 0.0), (4, 0.8)],
)
def test_temperature_top_k_and_top_p_by_definition(temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for masked in ([], [5]):
        probs = sampling_log_probs(LOGITS, params, torch.tensor(masked, dtype=torch.long)).exp()
        wanted = torch.tensor(
            [oracle(row, temperature, top_k, top_p, masked) for row in LOGITS.tolist()]
        )
        torch.testing.assert_close(probs, wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(probs == 0, wanted == 0)


def test_temperature_divides_logits_not_log_probs():
    log_probs = sampling_log_probs(LOGITS, SamplingParams(temperature=0.5), NONE)
    torch.testing.assert_close(log_probs, (LOGITS * 2).log_softmax(-1))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])  # the hub's generation_config has 1e-6
def test_greedy_reports_the_untempered_distribution(sampler, temperature):
    untempered = sampling_log_probs(
        LOGITS, SamplingParams(temperature=temperature, top_k=1, top_p=0.1), NONE
    )
    torch.testing.assert_close(untempered, LOGITS.log_softmax(-1))
    [[completion]] = sampler.generate(prompts()[:1], SamplingParams(8, temperature, top_k=1))
    wanted = full_log_probs(sampler.model, prompts()[0], completion.ids, SamplingParams())
    torch.testing.assert_close(torch.tensor(completion.log_probs), wanted, atol=1e-5, rtol=0)
    assert max(completion.log_probs) < -0.01


@pytest.fixture(params=[torch.float64, torch.float32], ids=["sums in float64", "in float32"])
def sums(request, monkeypatch) -> None:
    """draw as it is everywhere but on Apple's GPUs, and as it is there."""
    kernel = sys.modules["kernels.sampling"]
    monkeypatch.setattr(kernel, "widest_float", lambda device: request.param)


def test_the_widest_float():
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


def test_draw_follows_the_distribution(sums):
    probs = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.2, 0.25, 0.1, 0.0999, 0.0001, 0.0])
    n = 200_000
    ids = draw(probs.log().expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    counts, kept = torch.bincount(ids, minlength=10).double(), probs > 0
    assert counts[~kept].sum() == 0
    expected = probs.double() * n
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 22.5  # 6 degrees of freedom, p = 0.001


def test_draw_at_the_ends_of_the_unit_interval_gives_no_impossible_id(sums):
    probs = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 1e-8, 0.25, 1 - 2**-24])
    assert draw(probs.log(), uniforms).tolist() == [2, 2, 4, 4]
    # The largest number that Python's random() gives is 1 in float32.
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(probs[:1].log(), largest).tolist() == draw(probs[:1].log(), torch.ones(1)).tolist()
    assert draw(probs[:1].log(), torch.ones(1)).tolist() == [4]
    flat = torch.full(
        (1, 151_936), -math.log(151_936)
    )  # rounding of a long sum does not lead past the end
    flat[0, -1] = -math.inf
    assert draw(flat, torch.tensor([1 - 2**-24])).item() == 151_934


def test_sampled_frequencies_match_reported_log_probs(sampler):
    params = SamplingParams(1, 0.6, top_k=6, n=4000)
    [group] = sampler.generate([Prompt(tiny.row(1, 8))], params)
    reported = {c.ids[0]: c.log_probs[0] for c in group}
    assert len(reported) == 6
    assert sum(map(math.exp, reported.values())) == pytest.approx(1, abs=1e-5)
    for token, log_prob in reported.items():
        p = math.exp(log_prob)
        assert sum(c.ids[0] == token for c in group) / 4000 == pytest.approx(
            p, abs=4.5 * (p * (1 - p) / 4000) ** 0.5
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_and_vision_ids_never_come(sampler, temperature):
    """However likely the model finds them; and the log-probs are normalised without them."""
    biased = Sampler(Biased(sampler.model, dict.fromkeys(NEVER, 50.0)), sampler.tokenizer)
    params = SamplingParams(30, temperature, n=3)
    results = biased.generate(prompts()[:3], params)
    assert_same(results, sampler.generate(prompts()[:3], params))
    assert not {i for group in results for c in group for i in c.ids} & set(NEVER)
    assert sorted(sampler.masked_ids.tolist()) == sorted(NEVER)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path):
    tiny.make_folder(tmp_path, "text", vocab_rows=tiny.KNOWN_IDS - 1)
    with pytest.raises(InputError, match=r"ids up to 271.*vocab_size of 271"):
        load_sampler(str(tmp_path), "cpu", "float32")


# --- Where a response ends ---


@pytest.mark.parametrize("stop", STOPS, ids=["im_end", "endoftext"])
def test_both_stop_ids_end_a_response_and_belong_to_it(tokenizer, stop):
    engine, batch = scripted(tokenizer, [*tokenizer.encode("yes"), stop], "no, not ever")
    [[one], [two]] = engine.generate(batch, SamplingParams(9, 0.0))
    assert (
        one.ids == [*tokenizer.encode("yes"), stop]
        and one.text == "yes"
        and one.finish_reason == "stop"
    )
    assert (
        len(one.log_probs) == len(one.ids)
        and one.log_probs[-1] == pytest.approx(one.log_probs[0])
        and not any(one.forced)
    )
    assert two.ids == tokenizer.encode("no, not ever")[:9] and two.finish_reason == "length"


def test_a_stop_id_as_the_last_allowed_token_is_a_stop(tokenizer):
    engine, batch = scripted(tokenizer, [*tokenizer.encode("ab"), IDS["im_end"]])
    assert engine.generate(batch, SamplingParams(3, 0.0))[0][0].finish_reason == "stop"
    assert engine.generate(batch, SamplingParams(2, 0.0))[0][0].finish_reason == "length"


def test_a_response_ends_where_the_context_does(sampler):
    sizes = (505, 400, 511)
    batch = [Prompt(tiny.row(i, size)) for i, size in enumerate(sizes)]
    endless = Sampler(sampler.model, sampler.tokenizer, stop_ids=())
    results = endless.generate(batch, SamplingParams(120, 0.0))
    lengths = [len(completion.ids) for [completion] in results]
    assert [c.finish_reason for [c] in results] == ["length"] * 3 and lengths == [7, 112, 1]
    for prompt, [completion] in zip(batch, results):
        wanted = full_log_probs(sampler.model, prompt, completion.ids, SamplingParams())
        torch.testing.assert_close(torch.tensor(completion.log_probs), wanted, atol=1e-5, rtol=0)
    # No memory is set aside beyond the context.
    [[alone]] = endless.generate(batch[:1], SamplingParams(10**9, 0.0))
    assert alone.ids == results[0][0].ids


def test_a_prompt_that_fills_the_context_is_refused(sampler):
    with pytest.raises(InputError, match="prompt 2: its 512 tokens do not fit the context of 512"):
        sampler.generate([Prompt(tiny.row(0, 20)), Prompt(tiny.row(0, 512))], SamplingParams(4))


# --- Forced exit ---


def forced_exit(engine: Sampler, batch: list[Prompt], budget: int, **options) -> list:
    return [
        group[0]
        for group in engine.generate(batch, SamplingParams(60, 0.0, think_budget=budget, **options))
    ]


def test_think_budget_appends_the_tag_and_lets_the_model_answer(tokenizer):
    tag = tokenizer.encode("</think>")
    assert len(tag) > 3
    line = [
        *tokenizer.encode("x" * 12),
        *tokenizer.encode("z" * len(tag)),
        *tokenizer.encode("<answer>4</answer>"),
        IDS["im_end"],
    ]
    engine, batch = scripted(tokenizer, line)
    [completion] = forced_exit(engine, batch, 12)
    assert (
        completion.text == "x" * 12 + "</think><answer>4</answer>"
        and completion.finish_reason == "forced"
    )
    assert completion.ids[12 : 12 + len(tag)] == tag
    assert completion.forced == [False] * 12 + [True] * len(tag) + [False] * (
        len(line) - 12 - len(tag)
    )
    assert len(completion.log_probs) == len(completion.ids)
    other = -math.log(
        math.exp(5) + tiny.VOCAB_ROWS - len(NEVER) - 1
    )  # forced ids: what the model gave them, not 0
    assert completion.log_probs[12 : 12 + len(tag)] == pytest.approx([other] * len(tag), abs=1e-4)


def test_forced_ids_go_through_the_cache(sampler):
    """What follows a forced exit is conditioned on it, and its log-probs are right."""
    params = SamplingParams(30, 1.0, n=2, think_budget=8)
    tag = sampler.tokenizer.encode("</think>")
    groups = sampler.generate(prompts(), params)
    assert any(True in completion.forced for group in groups for completion in group)
    for prompt, group in zip(prompts(), groups, strict=True):
        for completion in group:
            assert len(completion.ids) <= 8 or completion.ids[8 : 8 + len(tag)] == tag
            wanted = full_log_probs(sampler.model, prompt, completion.ids, params)
            torch.testing.assert_close(
                torch.tensor(completion.log_probs), wanted, atol=1e-5, rtol=0
            )
    alone = [sampler.generate([prompt], params)[0] for prompt in prompts()]
    assert_same(sampler.generate(prompts(), params), alone)


@pytest.mark.parametrize(
    "budget, spelling",
    [(20, "tokens"), (20, "bytes"), (10, "tokens"), (8, "tokens"), (7, "bytes"), (5, "bytes")],
)
def test_no_tag_is_appended_where_it_has_come_or_is_half_written(tokenizer, budget, spelling):
    """The tag may come in other tokens than its usual ones: only the text counts.

    It begins at token 4 here."""
    text = "</think>"
    tag = tokenizer.encode(text) if spelling == "tokens" else byte_ids(tokenizer, text)
    line = [*tokenizer.encode("abcd"), *tag, *tokenizer.encode("<answer>1</answer>"), IDS["im_end"]]
    engine, batch = scripted(tokenizer, line)
    [completion] = forced_exit(engine, batch, budget)
    assert (
        completion.ids == line and not any(completion.forced) and completion.finish_reason == "stop"
    )


def test_what_only_looks_like_half_a_tag_is_forced_when_it_goes_on(tokenizer):
    engine, batch = scripted(tokenizer, byte_ids(tokenizer, "ab </theory and more"))
    [completion] = forced_exit(engine, batch, 6)
    assert completion.text.startswith("ab </the</think>") and completion.finish_reason == "length"
    engine, batch = scripted(
        tokenizer, byte_ids(tokenizer, "<" * 60)
    )  # always half a tag: its grace ends
    [completion] = forced_exit(engine, batch, 6)
    assert (
        completion.text.startswith("<" * 14 + "</think>") and completion.text.count("</think>") == 1
    )


def test_a_batch_is_forced_row_by_row(tokenizer):
    lines = [
        "u" * 60,
        [*tokenizer.encode("v"), IDS["im_end"]],
        "ww</think>" + "w" * 50,
        [*byte_ids(tokenizer, "y" * 9), IDS["endoftext"]],
    ]
    engine, batch = scripted(tokenizer, *lines)
    together = forced_exit(engine, batch, 9)
    assert [c.text[:18] for c in together] == [
        "u" * 9 + "</think>u",
        "v",
        "ww</think>wwwwwwww",
        "y" * 9 + "</think>.",
    ]
    assert [c.finish_reason for c in together] == ["length", "stop", "length", "length"]
    alone = [forced_exit(engine, [prompt], 9)[0] for prompt in batch]
    assert_same([[c] for c in together], [[c] for c in alone])


def test_think_budget_0_forces_at_once_and_a_budget_over_the_limit_never(tokenizer):
    engine, batch = scripted(tokenizer, "abc")
    assert forced_exit(engine, batch, 0)[0].text.startswith("</think>")
    assert not any(forced_exit(engine, batch, 60)[0].forced)


# --- Streaming ---


class Writes(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize("text", ["caf\u00e9 \u20ac5 \U0001f600!", "\u4f60\u597d"])
def test_streaming_never_prints_half_a_character(tokenizer, monkeypatch, text):
    engine, [prompt] = scripted(tokenizer, [*tokenizer.encode(text), IDS["im_end"]])
    out = Writes()
    monkeypatch.setattr(sys, "stdout", out)
    assert stream(engine, SamplingParams(40, 0.0), prompt) == text
    assert out.getvalue() == text + "\n"
    assert (
        "\ufffd" not in out.getvalue()
        and len([p for p in out.pieces if p.strip()]) >= len(text.replace(" ", "")) - 1
    )


def test_streaming_shows_a_broken_character_only_at_the_end(tokenizer, monkeypatch):
    engine, [prompt] = scripted(tokenizer, [*tokenizer.encode("a\u20ac")[:-1], IDS["im_end"]])
    out = Writes()
    monkeypatch.setattr(sys, "stdout", out)
    assert stream(engine, SamplingParams(40, 0.0), prompt) == "a\ufffd"
    assert out.getvalue() == "a\ufffd\n"


def test_equal_prompts_in_one_call_get_samples_of_their_own(sampler):
    prompt = prompts()[0]
    params = SamplingParams(max_new_tokens=12, temperature=1.0, n=2, seed=3)
    twice = sampler.generate([prompt, prompt], params)
    assert len({tuple(c.ids) for group in twice for c in group}) == 4
    assert [c.ids for c in twice[0]] == [c.ids for c in sampler.generate([prompt], params)[0]]
