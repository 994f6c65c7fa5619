"""The memory plan: what is counted, and that tensors without contents say what real ones do."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import grpo
import ranks
import sft
import tiny
from hub.config import Config
from hub.errors import InputError
from kernels import triton_or_none
from model import Qwen2_5_VL
from tools import plan_table
from training import plan as planning
from training.memory import ACTIVATIONS, HOST, Memory, on_card
from training.optimizer import update_remedies
from training.options import disk_needed
from training.plan import RESERVE, describe, plan_of, rehearsed, remedies
from training.rehearsal import (
    COPY,
    GRADIENTS,
    KV_CACHE,
    OPTIMIZER,
    REFERENCE,
    ROLLOUT,
    SCORE,
    STATES,
    UPDATE,
    WEIGHTS,
    Rehearsal,
    pretence,
)

MIB = 2**20
SHORT = {"checkpointing": "on", "device": "cpu"}
SFT = SHORT | {"max_length": 256, "pack_tokens": 256}
GRPO = SHORT | {
    "max_prompt_tokens": 64,
    "max_new_tokens": 128,
    "pack_tokens": 256,
    "kl_coef": 0.1,
    "questions_per_step": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A whole model folder, whose weights the real tensors are."""
    return str(tiny.make_folder(tmp_path_factory.mktemp("models") / "vl", "vl"))


@pytest.fixture(scope="module")
def config_only(tmp_path_factory) -> str:
    """A folder with a config.json and nothing else: what a plan needs."""
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text(json.dumps(tiny.config_dict("vl")))
    return str(path)


@pytest.fixture
def torch_only(monkeypatch):
    """Both kinds of tensors take torch's own kernels, which real ones need on a CPU."""
    monkeypatch.setenv("KERNELS", "sdpa")


def totals(peaks: dict) -> dict[str, int]:
    return {phase: on_card(peak) for phase, peak in peaks.items()}


# --- What is counted ------------------------------------------------------------------------------


def test_memory_counts_storages_while_they_live():
    with Memory() as memory:
        kept = torch.zeros(MIB, dtype=torch.uint8)
        assert memory.now[ACTIVATIONS] == MIB
        kept[: MIB // 2].view(-1).add_(1)  # views are no storages
        assert memory.now[ACTIVATIONS] == MIB
        with memory.phase("more"):
            torch.zeros(3 * MIB, dtype=torch.uint8)
        memory.mark("weights", [kept, None])
        assert memory.now == {ACTIVATIONS: 0, "weights": MIB}
        with memory.phase("host"):
            memory.mark(HOST, [kept])
            torch.zeros(2 * MIB, dtype=torch.uint8)
        del kept
        assert memory.now[HOST] == 0
    torch.zeros(MIB)  # nobody looks any more
    assert totals(memory.peaks) == {"setup": MIB, "more": 4 * MIB, "host": 2 * MIB}
    assert memory.peaks["more"] == {ACTIVATIONS: 4 * MIB}


def test_memory_follows_a_storage_that_is_resized():
    """So FSDP frees the weights that it has put together."""
    resize = torch.UntypedStorage.resize_
    with Memory() as memory:
        tensor = torch.zeros(MIB, dtype=torch.uint8)
        memory.mark("weights", [tensor])
        tensor.untyped_storage().resize_(0)
        assert memory.now["weights"] == 0
        tensor.untyped_storage().resize_(2 * MIB)
        assert memory.now["weights"] == 2 * MIB
    assert torch.UntypedStorage.resize_ is resize


# --- Without contents, as with them ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_one_process_needs_what_is_planned(folder, torch_only, stage, dtype):
    module, options = stage_of(stage, folder, dtype)
    real = Rehearsal()
    with real.memory:
        module.rehearse(options, real)
    fake = rehearsed(options, module.rehearse, 1)
    assert_same(real.memory.peaks, fake.memory.peaks)
    phases = {ROLLOUT, SCORE, UPDATE, OPTIMIZER} if stage == "grpo" else {UPDATE, OPTIMIZER}
    assert phases | {"setup"} == fake.memory.peaks.keys()

    # Weights, gradients and states are what they must be, whatever torch does in between.
    weights = fake.memory.peaks[UPDATE][WEIGHTS]
    size = 4 if dtype == "float32" else 2
    assert weights == size * sum(
        torch.Size(shape).numel()
        for name, shape in tiny.shapes(tiny.config_dict("vl")).items()
        if not name.startswith("visual.")
    )
    assert fake.memory.peaks[OPTIMIZER][GRADIENTS] == weights
    # AdamW has two float32 states. CompactAdamW has 2 + 2 + 1 bytes, and both count their steps.
    states = fake.memory.peaks[OPTIMIZER][STATES]
    assert states == pytest.approx(weights * (2 if dtype == "float32" else 2.5), rel=0.01)


def test_two_processes_need_what_is_planned(tmp_path, folder, monkeypatch):
    """Of the collectives' own memory nothing is counted: when gloo's threads let go of it, is
    chance (tests/rehearse_on_ranks.py says more)."""
    values = GRPO | {"model": folder, "dtype": "float32"}
    out = tmp_path / "real.json"
    monkeypatch.setenv("KERNELS", "sdpa")
    for code, _, complaint in ranks.run(
        2, ["tests/rehearse_on_ranks.py", str(out), json.dumps(values)]
    ):
        assert code == 0, complaint
    options = grpo.GRPOOptions(**values)
    fake = rehearsed(options, grpo.rehearse, 2)
    assert_same(json.loads(out.read_text()), fake.memory.peaks)
    # Half of everything, and in a rollout the whole model beside it.
    alone = rehearsed(options, grpo.rehearse, 1).memory.peaks
    for kind in (WEIGHTS, STATES, GRADIENTS):
        halves = fake.memory.peaks[OPTIMIZER][kind]
        assert 2 * halves == pytest.approx(alone[OPTIMIZER][kind], rel=0.01)
    assert fake.memory.peaks[ROLLOUT][COPY] == alone[ROLLOUT][WEIGHTS]


def stage_of(stage: str, folder: str, dtype: str):
    if stage == "sft":
        return sft, sft.SFTOptions(model=folder, dtype=dtype, **SFT)
    return grpo, grpo.GRPOOptions(model=folder, dtype=dtype, **GRPO)


def assert_same(real: dict, fake: dict) -> None:
    """Within 1%, phase by phase. (They have been equal to a few bytes.)"""
    assert real.keys() == fake.keys()
    for phase in real.keys() - {"setup"}:
        assert on_card(fake[phase]) == pytest.approx(on_card(real[phase]), rel=0.01), phase
        for kind, size in real[phase].items():
            slack = 0.01 * on_card(real[phase])
            assert fake[phase].get(kind, 0) == pytest.approx(size, abs=slack), (phase, kind)


def test_without_contents_the_gpus_kernels_are_taken_and_nothing_is_left_behind(config_only):
    environment, x = dict(os.environ), torch.zeros(1)
    with pretence(2):
        assert dist.get_world_size() == 2 and os.environ["WORLD_SIZE"] == "2"
        if triton_or_none.AVAILABLE:
            assert triton_or_none.use_triton(x, instead_of_torch=True)
    assert not triton_or_none.use_triton(x, instead_of_torch=True)
    with pytest.raises(ZeroDivisionError), pretence(2):
        1 / 0  # noqa: B018
    assert not dist.is_initialized() and dict(os.environ) == environment
    assert not triton_or_none.on_gpu(x)
    assert type(torch.zeros(1) + 1) is torch.Tensor


@pytest.mark.skipif(not triton_or_none.AVAILABLE, reason="no Triton")
def test_all_logits_are_never_made(tmp_path):
    """[4096, 40960] in float32 are 640 MiB; on the GPU's path there is a chunk of them."""
    config = tiny.config_dict("vl", vocab_rows=40960)
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = sft.SFTOptions(model=str(tmp_path), max_length=4096, checkpointing="on")
    peak = rehearsed(options, sft.rehearse, 1).memory.peaks[UPDATE]
    assert 64 * MIB < peak[ACTIVATIONS] < 320 * MIB


@pytest.mark.skipif(not triton_or_none.AVAILABLE, reason="no Triton")
def test_the_gpus_optimiser_makes_no_temporaries(config_only, monkeypatch):
    """Beside the random bits, which both are given, the definition makes master, gradient, both
    moments and denominator in float32, and more; the kernel has all of that in registers."""
    options = sft.SFTOptions(model=config_only, dtype="bfloat16", **SFT)
    made = {}
    for kernels in ("reference", "auto"):
        monkeypatch.setenv("KERNELS", kernels)
        peak = rehearsed(options, sft.rehearse, 1).memory.peaks[OPTIMIZER]
        made[kernels] = peak[ACTIVATIONS]
    largest = 4 * tiny.config_dict("vl")["vocab_size"] * tiny.config_dict("vl")["hidden_size"]
    assert made["auto"] >= largest and made["reference"] - made["auto"] >= 5 * largest


# --- What is made of it ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo_options(config_only) -> grpo.GRPOOptions:
    return grpo.GRPOOptions(model=config_only, **(GRPO | {"device": "auto"}))


@pytest.fixture(scope="module")
def seen(grpo_options) -> Rehearsal:
    return rehearsed(grpo_options, grpo.rehearse, 1)


def test_slots_take_what_is_left(grpo_options, seen):
    plenty = plan_of(seen, grpo_options, 1, 80 * 2**30)
    assert plenty.fits and plenty.slots == plenty.wanted_slots == 16
    assert plenty.peaks[ROLLOUT][KV_CACHE] == 16 * plenty.slot_bytes
    # A slot of 64 + 128 tokens: keys and values of 2 layers x 2 heads x 16, in bfloat16.
    assert plenty.slot_bytes == 192 * 2 * 2 * 2 * 16 * 2
    assert plenty.options.states_on == "device" and plenty.options.dtype == "bfloat16"
    # A card with room for a few.
    base = on_card(plenty.peaks[ROLLOUT]) - plenty.peaks[ROLLOUT][KV_CACHE]
    small = plan_of(seen, grpo_options, 1, RESERVE + base + 5 * plenty.slot_bytes + 7)
    assert small.slots == 5
    assert on_card(small.peaks[ROLLOUT]) == base + 5 * small.slot_bytes
    assert small.needed(ROLLOUT) == base + small.slot_bytes


def test_auto_puts_the_states_on_the_host_where_they_do_not_fit(grpo_options, seen, monkeypatch):
    on_device = plan_of(seen, grpo_options, 1, 80 * 2**30)
    needed = on_device.needed(on_device.fullest_phase)
    states = on_device.peaks[UPDATE][STATES]
    assert plan_of(seen, grpo_options, 1, RESERVE + needed).options.states_on == "device"
    on_host = plan_of(seen, grpo_options, 1, RESERVE + needed - 1)
    assert on_host.options.states_on == "host" and on_host.fits
    assert on_host.needed(UPDATE) == on_device.needed(UPDATE) - states
    assert on_host.peaks[UPDATE][HOST] == on_device.peaks[UPDATE][HOST] + states
    # Asked for the device, it does not fit, and says what would do. (As if more GPUs did not.)
    monkeypatch.setattr(planning, "rehearsed", lambda *_: seen)
    asked = replace(grpo_options, states_on="device")
    plan = plan_of(seen, asked, 1, RESERVE + needed - 1)
    assert not plan.fits and remedies(plan, grpo.rehearse) == ["--states-on host"]
    # Float32 weights have no compact states that could move.
    in_float32 = replace(grpo_options, dtype="float32", states_on="host")
    assert plan_of(seen, in_float32, 1, RESERVE + needed - 1).options.states_on == "device"


def test_remedies_are_the_fewest_gpus_and_shorter_packs(config_only):
    options = sft.SFTOptions(
        model=config_only, dtype="float32", max_length=64, pack_tokens=256, checkpointing="on"
    )
    rehearsal = rehearsed(options, sft.rehearse, 1)
    plan = plan_of(rehearsal, options, 1, 80 * 2**30)
    assert plan.fits and plan.fullest_phase == UPDATE
    # Too small for packs of 256 tokens, large enough for the optimiser's step.
    tight = plan_of(rehearsal, options, 1, RESERVE + plan.needed(UPDATE) - 1)
    assert not tight.fits and tight.wanted_slots == 0
    assert remedies(tight, sft.rehearse) == [
        "2 GPUs (torchrun --nproc_per_node 2)",
        "a lower --pack-tokens",
    ]
    # Nothing helps where not even an eighth of the states fits.
    assert remedies(plan_of(rehearsal, options, 1, 1000), sft.rehearse) == []


def test_what_is_printed(grpo_options, seen):
    text = describe(plan_of(seen, grpo_options, 1, 80 * 2**30))
    heading, _, columns, *rest = text.splitlines()
    assert heading == f"{grpo_options.model} on 1 GPU: planned, not measured"
    kinds = [WEIGHTS, GRADIENTS, STATES, REFERENCE, KV_CACHE, ACTIVATIONS]
    assert columns.split("  ")[-1].strip() == "total" and all(kind in columns for kind in kinds)
    assert [line.split("  ")[0] for line in rest[:4]] == [ROLLOUT, SCORE, UPDATE, OPTIMIZER]
    assert "It fits: " in text and "16 slots" in text and "packs of 256 tokens" in text
    assert "states are on the device" in text and "prompts of 64 tokens" in text


def test_states_on_the_host_help_where_the_optimiser_is_compact_only():
    assert "--states-on host" in update_remedies(sft.SFTOptions(dtype="bfloat16", device="cpu"))
    assert "--states-on host" not in update_remedies(sft.SFTOptions(dtype="float32", device="cpu"))


def test_the_disk_is_what_the_run_will_ask_for(grpo_options, seen):
    checkpoint, model = seen.checkpoint_bytes, seen.model_bytes
    for changes, needed in (
        ({}, 2 * checkpoint + 2 * model),
        ({"keep": 0}, 2 * model),
        ({"eval_every": 3}, 2 * checkpoint + 4 * model),
        ({"save_every": 0}, checkpoint + model),
    ):
        options = replace(grpo_options, **changes)
        text = describe(plan_of(seen, options, 1, 80 * 2**30))
        assert f"Disk: {needed / 1e9:.1f} GB" in text
        assert disk_needed(options, checkpoint, model) == needed


def test_what_is_saved(grpo_options, seen):
    """A checkpoint has the trained weights and 5 more bytes each; model/ has the tower, too."""
    sizes = {True: 0, False: 0}
    for name, shape in tiny.shapes(tiny.config_dict("vl")).items():
        sizes[name.startswith("visual.")] += torch.Size(shape).numel()
    assert seen.checkpoint_bytes == pytest.approx(7 * sizes[False], rel=0.01)
    assert seen.model_bytes == 4 * (sizes[False] + sizes[True])  # its config.json says float32


# --- The commands ---------------------------------------------------------------------------------


def test_plan_prints_and_stops(config_only, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--model", config_only, "--out", str(out), "--plan", "--gpus", "2"]
    sft.main(argv)
    printed = capsys.readouterr().out
    assert "each of 2 GPUs" in printed and "a GPU has 80.0" in printed and not out.exists()
    with pytest.raises(SystemExit) as ended:
        sft.main([*argv, "--gpu-gib", "4"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "It does not fit" in printed and f"What would help: {planning.NOTHING}." in printed


def test_without_data_prompts_are_assumed(config_only, folder, tmp_path, capsys):
    grpo.main(["--model", config_only, "--plan"])
    assert "questions that could not be looked at" in capsys.readouterr().out
    # With a tokenizer and data, the longest question is what counts.
    data = tmp_path / "questions.jsonl"
    lines = [{"id": str(n), "question": "x" * n, "answer": "1"} for n in (5, 40, 12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    options = grpo.GRPOOptions(model=folder, data=str(data))
    longest = Rehearsal().longest_prompt(options, grpo.load_questions)
    questions = grpo.load_questions(options, grpo.Tokenizer.from_pretrained(folder))
    assert longest == max(len(question.prompt.ids) for question in questions) > 40


def test_a_gpu_refuses_what_does_not_fit(config_only, monkeypatch):
    """In one line, and before anything is loaded: the folder has no weights."""
    options = sft.SFTOptions(model=config_only, gpu_gib=4.0, device="cpu")
    assert planning.settle(options, sft.rehearse) is options  # on a CPU nobody asks
    monkeypatch.setattr(planning, "training_device", lambda name: torch.device("cuda"))
    with pytest.raises(InputError, match="^this does not fit: .* needs .* what would help: ") as e:
        planning.settle(options, sft.rehearse)
    assert "\n" not in str(e.value)
    settled = planning.settle(replace(options, gpu_gib=8.0), sft.rehearse)
    assert settled == replace(options, gpu_gib=8.0, states_on="device")


def test_the_table_has_the_published_models(monkeypatch, capsys):
    counts = {"3B": 3_754_622_976, "7B": 8_292_166_656, "72B": 73_410_777_344}
    for name, count in counts.items():
        with torch.device("meta"):
            model = Qwen2_5_VL(Config.from_dict(plan_table.config_of(name)))
        assert sum(weight.numel() for weight in model.parameters()) == count
    # A row of a model that is small enough: the width has to be a multiple of 128 for each head.
    monkeypatch.setattr(plan_table, "SHAPES", {"tiny": (256, 1, 2, 1, 64, 512, True, 64)})
    with pytest.raises(InputError, match="--models 5B: there is tiny"):
        plan_table.main(["--models", "5B"])
    with pytest.raises(InputError, match="--gpus 3: there is 1, 2, 4, 8"):
        plan_table.main(["--models", "tiny", "--gpus", "3"])
    plan_table.main(["--models", "tiny", "--gpus", "1", "8"])
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == "| SFT / GRPO (slots) | 1 x 24 GB | 1 x 80 GB | 8 x 80 GB |"
    assert re.fullmatch(r"\| tiny \| \d / \d \(256\) \| \d / \d \(256\) \| \d / \d \(128\) \|", row)
