"""The benches run, and say what is wrong; what they measure is for its own output."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
from hub.options import run_command

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--prompts 2 --samples 2 --new-tokens 6 --natural-tokens 6 --repeats 1 --threads 1".split()

GROUPS = "--questions 1 --group-size 4 --new-tokens 4 --natural-tokens 9 --steps 1".split()
GROUPS += "--peer-batches 4 --modes full".split()


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """The bench as a user starts it."""
    script = str(ROOT / "benchmarks" / f"{name}.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


@pytest.fixture
def threads():
    """Benches set the number of threads; other tests get back what they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_logprob_on_a_cpu():
    done = bench("logprob", "--device", "cpu", "--dtype", "float32", "--tokens", "40", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"reference", "torch, chunked"} <= set(result["ways"]) and result["tokens"] == 40
    for way in result["ways"].values():
        assert way["forward_ms"] > 0 and way["forward_backward_ms"] > 0 and way["rate"] > 0


def test_tokenizing():
    done = bench("tokenizing", "--megabytes", "0.02", "--solutions", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["seconds"]) == {"read", "one by one", "in blocks", "keep", "find"}
    assert all(clock > 0 for clock, _ in result["seconds"].values()) and result["tokens"] > 1000


def test_rollout_without_a_peer():
    done = bench("rollout", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ours = result["full"]["ours"]
    assert ours["mean_length"] == 6 and ours["tokens_per_second"] > 0
    assert 1 <= result["natural"]["ours"]["mean_length"] <= 6 and "ratio" not in result["full"]


def test_sft_without_a_peer():
    sizes = "--rows 3 --steps 1 --rounds 1 --json".split()
    done = bench("sft", *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ours = result["ours"]
    assert result["rows"] == 3 and 0 < result["scored_tokens"] < result["tokens"]
    assert 0 < ours["last_loss"] < ours["first_loss"] and ours["tokens_per_second"] > 0
    assert "ratio" not in result and "transformers" not in result


def test_grpo_without_a_peer():
    sizes = "--questions 2 --group-size 4 --new-tokens 5 --natural-tokens 60 --steps 1 --rounds 1"
    done = bench("grpo", *sizes.split(), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    full, natural = result["full"], result["natural"]
    assert full["ours"]["response_tokens"] == 2 * 4 * 5
    assert full["ours"]["reward"] == pytest.approx(0.15)  # nothing is right, half have the bonus
    assert natural["ours"]["response_tokens"] <= 2 * 4 * 60 and "ratio" not in natural
    for found in (full, natural):
        assert found["ours"]["rollout_seconds"] < found["ours"]["seconds"]
        assert found["our_loss"]["grad_norm"] > 0 and 0 < found["our_loss"]["clip_fraction"] < 1


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_train_step_on_a_cpu(stage):
    sizes = "--pack-tokens 128 --packs 2 --prompts 2 --prompt-tokens 20 --new-tokens 8".split()
    done = bench(
        "train_step", "--shape", "tiny", "--stage", stage, "--device", "cpu", *sizes, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["metrics"]["grad_norm"] > 0 and result["tokens_per_second"] > 0
    assert {"forward and backward", "optimiser step"} <= set(result["planned_gib"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rollout", "--wrong"], "--wrong"),
        (["rollout", "--shape", "9b"], "0.5b"),
        (["tokenizing", "--data", "micro/data/rl.jsonl"], "no worked responses"),
        (["rollout", "--prompts", "100000"], "questions only"),
        (["rollout", *SMALL, "--peer", "/no/such/python"], "--peer /no/such/python"),
        (["logprob", "--device", "cpu", "--tokens", "9", "--peer", "false"], "--peer false"),
        (["rollout", *SMALL, "--peer", "false"], "--peer false"),
        (["sft", "--rows", "2", "--steps", "1", "--peer", "false"], "--peer false"),
        (["sft", "--rows", "100000"], "rows only"),
        (["sft", "--peer-batches", "0"], "--peer-batches"),
        (["grpo", *GROUPS, "--peer", "false"], "--peer false"),
        (["grpo", "--questions", "100000"], "questions only"),
        (["grpo", "--peer", "false", "--peer-batches", "3"], "--peer-batches 3"),
        (["grpo", "--modes", "fast"], "full, natural"),
        (["rollout", *SMALL, "--peer-batches", "many"], "--peer-batches"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, monkeypatch, capsys, threads):
    name, *rest = arguments
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *rest])
    with pytest.raises(SystemExit) as caught:
        run_command(importlib.import_module(f"benchmarks.{name}").main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error, error
    assert len(error.splitlines()) == 1, error


def test_train_step_on_two_processes():
    sizes = "--pack-tokens 128 --packs 3 --device cpu --json".split()
    command = ["benchmarks/train_step.py", "--shape", "tiny", "--stage", "sft", *sizes]
    done = ranks.run(2, command)
    assert [code for code, _, _ in done] == [0, 0], done
    result = json.loads(done[0][1].splitlines()[-1])
    assert result["processes"] == 2 and result["metrics"]["grad_norm"] > 0 and not done[1][1]
