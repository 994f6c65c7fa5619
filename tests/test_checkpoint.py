"""Checkpoints: whole or not there, exact, and what is said of damaged or foreign ones."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import kill_nine
import ranks
import tiny
from hub.errors import InputError
from test_commands import GRPO_RUN, SFT_RUN, question, worked
from training import checkpoint, compact
from training.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    read_step,
    save_checkpoint,
    training_state,
)
from training.optimizer import load_for_training, make_optimizer, optimizer_step
from training.options import TrainOptions


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> TrainOptions:
    folder = tiny.make_folder(tmp_path_factory.mktemp("model"), "vl_tied")
    return TrainOptions(model=str(folder), device="cpu")


@pytest.fixture
def trained(options):
    """Makes a model and its optimiser after some steps on noise."""

    def make(steps: int, dtype: str = "float32"):
        o = replace(options, dtype=dtype)
        model = load_for_training(o)
        optimizer = make_optimizer(model, o)
        for step in range(steps):
            update(model, optimizer, step)
        return model, optimizer

    return make


def update(model, optimizer, step: int) -> None:
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer_step(model, optimizer, 1e-3, 1.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def numbers(step: int = 1) -> dict[str, torch.Tensor]:
    """A small state of several dtypes."""
    torch.manual_seed(step)
    return {
        "weights.a": torch.randn(3, 4).bfloat16(),
        "optimizer.a.low": torch.randint(-128, 128, (3, 4), dtype=torch.int8),
        "optimizer.a.step": torch.tensor(float(step)),
    }


def test_a_state_comes_back_in_place_and_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path, 7, numbers(), keep=1)
    [path] = find_checkpoints(tmp_path)
    assert (path.name, read_step(path)) == ("step-000007", 7)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in numbers().items()}
    load_checkpoint(path, dict(tensors))
    assert all(torch.equal(tensors[name], value) for name, value in numbers().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_optimiser_takes_the_same_next_step(trained, tmp_path, dtype):
    model, optimizer = trained(2, dtype)
    save_checkpoint(tmp_path, 2, training_state(model, optimizer), keep=1)
    update(model, optimizer, 2)
    again, its_optimizer = trained(0, dtype)
    load_checkpoint(find_checkpoints(tmp_path)[0], training_state(again, its_optimizer))
    update(again, its_optimizer, 2)
    for (name, weight), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(weight, other), name


def test_the_frozen_tower_is_left_out_and_nothing_else(trained):
    model, optimizer = trained(1)
    weights = [name for name, _ in model.named_parameters() if not name.startswith("visual.")]
    keys = ("exp_avg", "exp_avg_sq", "step")
    wanted = {f"weights.{name}" for name in weights}
    wanted |= {f"optimizer.{name}.{key}" for name in weights for key in keys}
    assert training_state(model, optimizer).keys() == wanted


@pytest.mark.parametrize("keep, left", [(1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_ones_are_kept(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, numbers(step), keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]
    assert [read_step(path) for path in find_checkpoints(tmp_path)] == left[::-1]


def test_steps_are_numbers_and_not_words(tmp_path):
    """After a million steps, too, the last one is the newest."""
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, numbers(), keep=2)
    assert [read_step(path) for path in find_checkpoints(tmp_path)] == [1_000_000, 999_999]


@pytest.mark.parametrize("what", ["save", "sync", "replace", "rmtree"])
def test_wherever_a_save_is_interrupted_a_whole_checkpoint_is_there(tmp_path, monkeypatch, what):
    places = {
        "save": (dcp, "save"),
        "sync": (checkpoint, "sync"),
        "replace": (os, "replace"),
        "rmtree": (checkpoint.shutil, "rmtree"),
    }
    save_checkpoint(tmp_path, 1, numbers(1), keep=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*places[what], lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        save_checkpoint(tmp_path, 2, numbers(2), keep=1)
    newest = find_checkpoints(tmp_path)[0]
    # The new one counts from the moment on at which it has its name.
    step = 2 if what == "rmtree" else 1
    state = numbers(9)
    load_checkpoint(newest, state)
    assert read_step(newest) == step
    assert all(torch.equal(state[name], value) for name, value in numbers(step).items())
    # The next save clears away what was left.
    save_checkpoint(tmp_path, 3, numbers(3), keep=1)
    assert names(tmp_path) == ["step-000003"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure could leave a checkpoint of empty files behind."""
    happened, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(new, final):
        happened.append(f"-> {os.path.basename(final)}")
        replace(new, final)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_checkpoint(tmp_path / "checkpoint", 1, numbers(), keep=1)
    renamed = happened.index("-> step-000001")
    before = {name.removesuffix(".tmp") for name in happened[:renamed]}
    assert before >= {"__0_0.distcp", ".metadata", "state.json", "step-000001", tmp_path.name}
    assert happened[renamed + 1 :] == ["checkpoint"]


def test_metadata_of_other_bytes_is_called_damaged(tmp_path):
    save_checkpoint(tmp_path, 1, numbers(), keep=1)
    [path] = find_checkpoints(tmp_path)
    length = len((path / ".metadata").read_bytes())
    for seed in range(20):
        (path / ".metadata").write_bytes(random.Random(seed).randbytes(length))
        with pytest.raises(InputError, match=r"damaged \(.metadata"):
            load_checkpoint(path, numbers(2))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999, None])
def test_a_cut_checkpoint_is_called_damaged(tmp_path, name, share):
    save_checkpoint(tmp_path, 1, numbers(), keep=1)
    [path] = find_checkpoints(tmp_path)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if share is not None:
        (path / name).write_bytes(content[: int(share * len(content))])
    state = numbers(2)
    with pytest.raises(InputError, match="damaged|state.json") as caught:
        load_checkpoint(path, state)
    assert str(path) in str(caught.value) and name in str(caught.value)
    assert all(torch.equal(state[key], value) for key, value in numbers(2).items())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError("full"), OSError(5, "I/O error")]
)
def test_other_errors_are_not_called_damage(tmp_path, monkeypatch, error):
    """Nobody should delete a checkpoint since a GPU was too small."""
    save_checkpoint(tmp_path, 1, numbers(), keep=1)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    with pytest.raises(type(error)) as caught:
        load_checkpoint(find_checkpoints(tmp_path)[0], numbers())
    assert caught.value is error


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    """Which commands say in one line, while DCP's own error is no Exception."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 1, numbers(), keep=1)
    assert find_checkpoints(tmp_path) == []


def test_other_tensors_are_refused(tmp_path):
    save_checkpoint(tmp_path, 1, numbers(), keep=1)
    [path] = find_checkpoints(tmp_path)
    missing, other_dtype, other_shape = numbers(), numbers(), numbers()
    del missing["optimizer.a.low"]
    other_dtype["weights.a"] = torch.zeros(3, 4)
    other_shape["weights.a"] = torch.zeros(4, 3, dtype=torch.bfloat16)
    for state in (missing, missing | {"new": torch.zeros(1)}, other_dtype, other_shape):
        with pytest.raises(InputError, match="another model or .* differ, the first is "):
            load_checkpoint(path, state)


def test_nothing_is_said_on_one_process(tmp_path, recwarn, capfd):
    save_checkpoint(tmp_path, 1, numbers(), keep=1)
    load_checkpoint(find_checkpoints(tmp_path)[0], numbers())
    assert capfd.readouterr() == ("", "") and not recwarn.list


# --- From one optimiser to the other ---


def masters_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 masters in the state of either optimiser, by the weights' names."""
    masters = {}
    for name, weight in state.items():
        if name.startswith("weights."):
            low = state.get(f"optimizer.{name.removeprefix('weights.')}.low")
            masters[name] = weight if low is None else compact.join(weight, low)
    return masters


def passed_on(state: dict, target: dict, folder: Path) -> dict:
    """Saves a state, and loads it into another one, which may be of the other optimiser."""
    save_checkpoint(folder, 1, state, keep=1)
    addresses = [tensor.data_ptr() for tensor in target.values()]
    load_checkpoint(find_checkpoints(folder)[0], target)
    assert addresses == [tensor.data_ptr() for tensor in target.values()]
    return target


def test_compact_states_become_float32_exactly_and_come_back_the_same(
    trained, tmp_path, monkeypatch
):
    # Many pieces, the last of which is shorter.
    monkeypatch.setattr(compact, "CHUNK", 1000)
    before = training_state(*trained(3, "bfloat16"))
    there = passed_on(before, training_state(*trained(0)), tmp_path / "there")
    for name, master in masters_of(before).items():
        assert there[name].dtype == torch.float32 and torch.equal(there[name], master), name
    for name, tensor in there.items():
        if name.startswith("optimizer."):
            assert torch.equal(tensor, before[name].float()), name
    again = passed_on(there, training_state(*trained(0, "bfloat16")), tmp_path / "again")
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_float32_states_become_the_nearest_compact_ones(trained, tmp_path):
    before = training_state(*trained(3))
    after = passed_on(before, training_state(*trained(0, "bfloat16")), tmp_path)
    masters = masters_of(after)
    for name, exact in masters_of(before).items():
        # A master keeps 16 bits of its significand, and a weight 8, the nearest to the master.
        assert torch.all((masters[name] - exact).abs() <= exact.abs() * 2**-16), name
        distance = (after[name].float() - masters[name]).abs()
        assert torch.all(distance <= (masters[name].bfloat16().float() - masters[name]).abs())
        assert torch.any(masters[name] != after[name].float()), name
    for name, tensor in before.items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            assert torch.equal(after[name], tensor.bfloat16()), name
        if name.endswith(".step"):
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("key, value", [("step", torch.zeros(2)), ("low", None), ("more", None)])
def test_what_neither_optimiser_has_is_not_converted(trained, tmp_path, key, value):
    compact_state = training_state(*trained(0, "bfloat16"))
    name = "optimizer.model.norm.weight."
    if key == "more":
        compact_state[name + key] = torch.zeros(1)
    elif value is None:
        del compact_state[name + key]
    else:
        compact_state[name + key] = value
    save_checkpoint(tmp_path, 1, compact_state, keep=1)
    state = training_state(*trained(0))
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(InputError, match="another model or .* differ, the first is "):
        load_checkpoint(find_checkpoints(tmp_path)[0], state)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_metadata_is_read_once(trained, tmp_path, monkeypatch):
    """It is the larger, the more weights there are, and each weight is a load."""
    save_checkpoint(tmp_path, 1, training_state(*trained(0, "bfloat16")), keep=1)
    reads, read = [], FileSystemReader.read_metadata
    monkeypatch.setattr(
        FileSystemReader, "read_metadata", lambda *a, **k: reads.append(a) or read(*a, **k)
    )
    load_checkpoint(find_checkpoints(tmp_path)[0], training_state(*trained(0)))
    assert len(reads) == 1


# --- kill -9 ---


@pytest.mark.parametrize(
    "command, extra, make", [("sft", SFT_RUN, worked), ("grpo", GRPO_RUN, question)]
)
def test_kill_nine_at_two_moments(tmp_path, command, extra, make, capsys):
    """`python tests/kill_nine.py` does it at twenty, on the micro world."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(make(i)) + "\n" for i in range(8)))
    model = tiny.make_folder(tmp_path / "model", "vl_tied")
    argv = ["--model", str(model), "--data", str(data), "--device", "cpu", *extra]
    kill_nine.check(command, argv, tmp_path, moments=2)
    assert capsys.readouterr().out.count("same bits") == 2


# --- Several processes ---


def test_saved_by_three_processes_and_resumed_by_one_and_two(tmp_path):
    """Another number of processes adds up in another order: weights differ by rounding alone."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(worked(i)) + "\n" for i in range(8)))
    model = tiny.make_folder(tmp_path / "model", "vl_tied")
    argv = ["sft.py", "--model", str(model), "--data", str(data), "--device", "cpu"]
    argv += ["--batch-size", "4", "--pack-tokens", "128", "--learning-rate", "1e-4"]

    def train(n: int, steps: int, out: str, *more: str) -> Path:
        command = [*argv, "--max-steps", str(steps), "--out", str(tmp_path / out), *more]
        for code, _, complaint in ranks.run(n, command):
            assert code == 0, complaint
            assert "Warning" not in complaint
        return tmp_path / out

    alone = kill_nine.read_checkpoint(train(1, 4, "alone"))
    train(3, 2, "by-3")
    shutil.copytree(tmp_path / "by-3", tmp_path / "by-3-copy")
    for n, out in ((1, "by-3"), (2, "by-3-copy")):
        found = train(n, 4, out, "--resume")
        tensors = kill_nine.read_checkpoint(found)
        assert tensors.keys() == alone.keys()
        for name, tensor in alone.items():
            assert (tensors[name] - tensor).abs().max() < 2e-6, name
        lines = (found / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        [resumed] = json.loads((found / "config.json").read_text())["resumed"]
        assert (resumed["step"], resumed["processes"]) == (2, n)


def test_saved_by_one_process_in_bfloat16_resumed_by_two_and_then_by_one(tmp_path):
    """At a learning rate so low that masters stay what they are, but for rounding."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(worked(i)) + "\n" for i in range(4)))
    model = tiny.make_folder(tmp_path / "model", "vl_tied")
    argv = ["sft.py", "--model", str(model), "--data", str(data), "--out", str(run)]
    argv += ["--device", "cpu", "--dtype", "bfloat16", "--batch-size", "2", "--pack-tokens", "128"]
    argv += ["--learning-rate", "1e-12", "--save-every", "1"]

    def train(n: int, steps: int, *more: str) -> dict[str, torch.Tensor]:
        for code, _, complaint in ranks.run(n, [*argv, "--max-steps", str(steps), *more]):
            assert code == 0, complaint
        return kill_nine.read_checkpoint(run)

    # One process takes three steps, and two take the third one again.
    alone = train(1, 3, "--keep", "2")
    shutil.rmtree(run / "checkpoint/step-000003")
    saved = kill_nine.read_checkpoint(run)
    by_two = train(2, 3, "--resume")
    by_one = train(1, 4, "--resume")
    assert by_one.keys() == saved.keys()
    for name, master in masters_of(saved).items():
        assert by_two[name].dtype == torch.float32
        assert (by_two[name] - master).abs().max() < 1e-10, name
        # Its step rounds stochastically.
        difference = (masters_of(by_one)[name] - master).abs()
        assert torch.all(difference <= master.abs() * 2**-15 + 1e-10), name
    for name, state in by_two.items():
        if name.endswith(".step"):
            assert (state.item(), by_one[name].item()) == (3, 4)
        elif name.startswith("optimizer."):
            # The gradients are the same, but for bfloat16's rounding.
            assert (state - alone[name].float()).norm() < 0.05 * state.norm(), name
