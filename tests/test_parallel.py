"""Several processes train as one does: FSDP2 over gloo, on a CPU."""

import json
import time
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from model import Qwen2_5_VL
from training import parallel


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six questions of different lengths with worked responses, for both stages."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    lines = []
    for i in range(6):
        record = {
            "id": f"q{i}",
            "question": f"What is {i} + {i}?{' Think.' * i}",
            "answer": str(2 * i),
            "response": f"<think>{i} and {'and' * i} {i}</think><answer>{2 * i}</answer>",
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def trained(tmp_path_factory, tmp_path, data):
    """Returns a function that takes three steps of a stage on n processes."""

    def train(stage: str, n: int, variant: str, **changes) -> dict:
        folder = tmp_path / variant
        if not folder.exists():
            tiny.make_folder(folder, variant)
        out = tmp_path / f"{n}.pt"
        options = {"model": str(folder), "data": str(data), "device": "cpu", **changes}
        command = ["tests/on_ranks.py", stage, str(out), json.dumps(options)]
        for code, _, complaint in ranks.run(n, command):
            assert code == 0, complaint
        return torch.load(out, weights_only=True)

    return train


def largest_difference(one: dict, other: dict) -> float:
    """Between the weights that two runs end with."""
    assert one["weights"].keys() == other["weights"].keys()
    differences = []
    for name, weight in one["weights"].items():
        differences.append((other["weights"][name] - weight).abs().max().item())
    return max(differences)


SFT = {"batch_size": 5, "max_length": 128}
GRPO = {"questions_per_step": 4, "group_size": 4, "max_new_tokens": 8, "pack_tokens": 128}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        # Packs of 1 to 3 rows, so that the ranks' shares are uneven.
        ("vl", {**SFT, "pack_tokens": 160}),
        # One pack for all: all ranks but the first have nothing to do.
        ("vl_tied", {**SFT, "pack_tokens": 4096, "checkpointing": "on"}),
    ],
)
def test_sft_on_several_processes_is_that_of_one(trained, variant, options):
    alone = trained("sft", 1, variant, **options)
    for n in (2, 3):
        together = trained("sft", n, variant, **options)
        assert largest_difference(alone, together) < 2e-6
        for one, other in zip(alone["metrics"], together["metrics"], strict=True):
            assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("vl", {**GRPO, "kl_coef": 0.1, "updates_per_rollout": 2}),
        ("vl_tied", {**GRPO, "checkpointing": "on"}),
    ],
)
def test_grpo_on_several_processes_is_that_of_one(trained, variant, options):
    alone = trained("grpo", 1, variant, **options)
    assert any(record["reward"] for record in alone["samples"])
    for n in (2, 3):
        together = trained("grpo", n, variant, **options)
        assert together["samples"] == alone["samples"]
        assert largest_difference(alone, together) < 2e-6
        for one, other in zip(alone["metrics"], together["metrics"], strict=True):
            for name in one.keys() - {"rollout_seconds", "rollout_tokens_per_second"}:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_in_bfloat16_the_shards_are_finer_than_what_is_seen_of_them(trained, tmp_path):
    """On several GPUs the masters are float32, and lie off the grid that the folder's are on."""
    model = Qwen2_5_VL.from_pretrained(tiny.make_folder(tmp_path / "vl", "vl"))
    model.save_pretrained(tmp_path / "vl", dtype=torch.bfloat16)
    options = {**SFT, "pack_tokens": 160, "dtype": "bfloat16"}
    start = trained("sft", 2, "vl", **options, steps=0)
    files = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    finer = 0
    for name, master in start["weights"].items():
        assert torch.equal(master.bfloat16(), files[name]), name
        finer += (master != files[name].float()).float().mean().item() > 0.9
    assert finer > 20
    two, three = trained("sft", 2, "vl", **options), trained("sft", 3, "vl", **options)
    for one, other in zip(two["metrics"], three["metrics"], strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_work_is_dealt_out_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(parallel.deal("abcd", "-"))
    assert shares == [["a", "d"], ["b", "-"], ["c", "-"]]
    assert parallel.deal("", "-") == []


def test_on_one_process_nothing_is_shared():
    assert parallel.deal([1, 2], None) == [1, 2]
    assert parallel.total([1.5]) == [1.5] and parallel.exchange({1: 2}) == {1: 2}
    assert parallel.any_rank(True) and not parallel.any_rank(False)


def wait_for_steps(metrics: Path, process) -> None:
    """Waits until three steps are logged."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_a_killed_process_ends_all_and_the_run_can_go_on(tmp_path, data):
    model, out = tiny.make_folder(tmp_path / "vl", "vl"), tmp_path / "run"
    command = ["sft.py", "--model", str(model), "--data", str(data), "--out", str(out)]
    command += ["--save-every", "1", "--batch-size", "3", "--epochs", "1000", "--max-steps", "1000"]
    metrics, processes = out / "metrics.jsonl", ranks.start(2, command)
    try:
        wait_for_steps(metrics, processes[0])
        processes[1].kill()
        _, complaint = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 2 and "Traceback" not in complaint
    assert "sft.py: error: lost another process of this run" in complaint
    # At least the step before the last that was logged is saved.
    steps = len(metrics.read_bytes().splitlines())
    [(code, _, complaint)] = ranks.run(1, [*command[:-1], str(steps + 1), "--resume"])
    assert code == 0, complaint
    assert len(metrics.read_bytes().splitlines()) == steps + 1


def test_a_sigterm_to_one_process_stops_all_after_their_step(tmp_path, data):
    model, out = tiny.make_folder(tmp_path / "vl", "vl"), tmp_path / "run"
    command = ["sft.py", "--model", str(model), "--data", str(data), "--out", str(out)]
    command += ["--save-every", "0", "--batch-size", "3", "--epochs", "1000", "--max-steps", "1000"]
    command += ["--eval-every", "2", "--eval-data", str(data), "--eval-new-tokens", "4"]
    metrics, processes = out / "metrics.jsonl", ranks.start(2, command)
    try:
        wait_for_steps(metrics, processes[0])
        processes[1].terminate()
        complaints = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], complaints
    assert "stopped by SIGTERM after step" in complaints[0] and "SIGTERM" not in complaints[1]
    steps = len(metrics.read_bytes().splitlines())
    assert (out / "checkpoint" / f"step-{steps:06d}" / "state.json").exists()
    # Validation is shared, too, and its best model is written once.
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 2
    best = Qwen2_5_VL.from_pretrained(out / "best")
    assert best.state_dict().keys() == Qwen2_5_VL.from_pretrained(model).state_dict().keys()


def test_a_process_that_fails_alone_ends_all(tmp_path, data):
    """It does not wait for the others, which wait for it."""
    model, out = tiny.make_folder(tmp_path / "vl", "vl"), tmp_path / "out.pt"
    options = {"model": str(model), "data": str(data), "device": "cpu", "fails": 1, **SFT}
    command = ["tests/on_ranks.py", "sft", str(out), json.dumps(options)]
    done = ranks.run(2, command, timeout=60)
    (code, _, complaint), (failed_code, _, failed) = done
    assert failed_code == 1 and "a bug of rank 1" in failed and "Traceback" in failed
    assert code == 2 and "lost another process of this run" in complaint
