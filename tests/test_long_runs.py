"""Long runs of both stages: divergence, validation, convergence, going on for longer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
import sft
import tiny
from hub.errors import InputError
from kill_nine import read_checkpoint
from model import Qwen2_5_VL
from training.metrics import reward_converged
from training.options import TrainOptions
from training.run import Run
from training.validation import Validation


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl_tied")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_logged(o: TrainOptions) -> list[int]:
    return [record["step"] for record in records(Path(o.out) / "metrics.jsonl")]


def questions(n: int = 6) -> str:
    lines = []
    for i in range(n):
        record = {"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)}
        record["response"] = f"<think>{i} and {i}</think> <answer>{2 * i}</answer>"
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


@pytest.fixture
def stage(folder, tmp_path):
    """Makes options of a stage for a run of a few steps."""
    data = tmp_path / "questions.jsonl"
    data.write_text(questions())
    common = {"model": str(folder), "data": str(data), "device": "cpu", "learning_rate": 1e-3}
    settings = {
        sft: {"batch_size": 2, "max_steps": 6, "epochs": 2},
        grpo: {"questions_per_step": 2, "group_size": 3, "max_new_tokens": 6, "max_steps": 6},
    }

    def make(module, **changes) -> TrainOptions:
        cls = {sft: sft.SFTOptions, grpo: grpo.GRPOOptions}[module]
        return cls(**{**common, "out": str(tmp_path / "run"), **settings[module], **changes})

    return make


@pytest.fixture
def odd_is_right(monkeypatch):
    """About half of all responses are right, for both stages."""
    for module in (sft, grpo):
        monkeypatch.setattr(
            module, "accuracy_reward", lambda response, *_, **__: sum(map(ord, response)) % 2.0
        )


@pytest.mark.parametrize("module", [sft, grpo])
def test_a_diverged_step_leaves_its_batch_behind(stage, odd_is_right, monkeypatch, module):
    o = stage(module, save_every=2)
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(100))

    def third_is_infinite(*args):
        norm = clip(*args)
        return norm * torch.inf if next(count) == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", third_is_infinite)
    with pytest.raises(InputError, match="step 3: .*diverged.*--learning-rate.*diverged.json"):
        module.train(o)
    left = json.loads((Path(o.out) / "diverged.json").read_text())
    assert left["step"] == 3 and left["learning_rate"] > 0 and "norm is" in left["message"]
    # The third batch is what the first epoch of three steps has left over.
    assert len(left["ids"]) == 2 and set(left["ids"]) < {f"q{i}" for i in range(6)}
    if module is grpo:
        seen = {record["id"] for record in records(Path(o.out) / "samples.jsonl")}
        assert set(left["ids"]) == {f"q{i}" for i in range(6)} - seen
    assert steps_logged(o) == [1, 2]
    assert Run(replace(o, resume=True)).step == 2


@pytest.mark.parametrize("module", [sft, grpo])
def test_the_best_model_by_validation_is_kept(stage, odd_is_right, monkeypatch, module):
    o = stage(module, eval_every=2, eval_data=stage(module).data, save_every=1, eval_new_tokens=6)
    scores = iter([0.25, 0.75, 0.5])
    asked, measure = [], Validation.measure

    def scripted(validation, model) -> float:
        asked.append(measure(validation, model))
        return next(scores)

    monkeypatch.setattr(Validation, "measure", scripted)
    module.train(o)
    out = Path(o.out)
    found = {record["step"]: record.get("eval_reward") for record in records(out / "metrics.jsonl")}
    assert found == {1: None, 2: 0.25, 3: None, 4: 0.75, 5: None, 6: 0.5}
    assert best_of(o) == (4, 0.75)
    # What was really measured is a mean over the six questions.
    assert all(6 * value == pytest.approx(round(6 * value)) for value in asked)
    # It is the model of step 4, in a folder like any other.
    module.train(stage(module, max_steps=4, out=f"{out}-short"))
    best = load_file(out / "best" / "model.safetensors")
    wanted = load_file(Path(f"{out}-short") / "model" / "model.safetensors")
    assert all(torch.equal(best[name], weight) for name, weight in wanted.items())
    assert Qwen2_5_VL.from_pretrained(out / "best").config
    assert {p.name for p in (out / "model").iterdir()} | {"best.json"} == {
        p.name for p in (out / "best").iterdir()
    }


def best_of(o) -> tuple[int, float]:
    best = json.loads((Path(o.out) / "best" / "best.json").read_text())
    return best["step"], best["eval_reward"]


def test_the_best_so_far_survives_a_resume(stage, monkeypatch, tmp_path):
    scores = iter([0.75, 0.5, 0.6, 0.8, 0.1])
    monkeypatch.setattr(Validation, "measure", lambda validation, model: next(scores))
    o = stage(sft, eval_every=1, eval_data=stage(sft).data, max_steps=2)
    sft.train(o)
    sft.train(replace(o, resume=True, max_steps=3))
    assert best_of(o) == (1, 0.75)
    sft.train(replace(o, resume=True, max_steps=4))
    assert best_of(o) == (4, 0.8)
    # Rewards on other questions are not comparable.
    other = tmp_path / "other.jsonl"
    other.write_text(Path(o.data).read_text() + "\n")
    sft.train(replace(o, resume=True, max_steps=5, eval_data=str(other)))
    assert best_of(o) == (5, 0.1)


def test_validation_changes_no_step(stage, odd_is_right, tmp_path):
    plain = stage(grpo, max_steps=4)
    watched = stage(grpo, max_steps=4, eval_every=1, eval_data=plain.data, out=f"{plain.out}-2")
    for o in (plain, watched):
        grpo.train(o)
    one, other = read_checkpoint(Path(plain.out)), read_checkpoint(Path(watched.out))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_validation_needs_data_without_images(stage, tmp_path):
    with pytest.raises(InputError, match="--eval-every needs --eval-data"):
        sft.train(stage(sft, eval_every=1))
    with pytest.raises(InputError, match="--eval-data needs --eval-every"):
        sft.train(stage(sft, eval_data=stage(sft).data))
    data = tmp_path / "images.jsonl"
    data.write_text('{"question": "q", "answer": "1", "image": "x.png"}\n')
    with pytest.raises(InputError, match="images.jsonl.*text only"):
        sft.train(stage(sft, eval_every=1, eval_data=str(data)))
    assert not Path(stage(sft).out).exists()


@pytest.mark.parametrize(
    "rewards, window, converged",
    [
        ([0.5, 0.5], 1, True),
        ([0.5, 0.52], 1, False),  # risen by more than 0.01
        ([0.5, 0.505], 1, True),
        ([0.9, 0.1], 1, True),  # fallen
        ([0.5] * 9, 5, False),  # too few to say
        ([0.5] * 10, 5, True),
        ([0.1] * 5 + [0.5] * 10, 5, True),  # what was before does not count
        ([0.1] * 2 + [0.5] * 3, 2, False),
        ([0.5] * 10, 0, False),
    ],
)
def test_convergence_by_hand(rewards, window, converged):
    assert reward_converged(rewards, window, 0.01) == converged


def test_grpo_stops_when_the_reward_has_converged(stage, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "accuracy_reward", lambda *_, **__: 1.0)
    o = stage(grpo, max_steps=9, stop_window=2)
    grpo.train(o)
    assert steps_logged(o) == [1, 2, 3, 4] and Run(replace(o, resume=True)).step == 4
    assert "stopped after step 4: the reward has not risen by" in capsys.readouterr().err
    # It has still converged when it is resumed; without the criterion it goes on.
    grpo.train(replace(o, resume=True))
    assert steps_logged(o) == [1, 2, 3, 4]
    grpo.train(replace(o, resume=True, stop_window=0, max_steps=5))
    assert steps_logged(o) == [1, 2, 3, 4, 5]


def test_warm_up_is_that_of_the_first_start(stage, odd_is_right):
    """A run that goes on for longer keeps its learning rates."""
    o = stage(grpo, max_steps=4, warmup_ratio=0.75, learning_rate=3e-3)
    grpo.train(o)
    grpo.train(replace(o, resume=True, max_steps=8))
    rates = [record["lr"] for record in records(Path(o.out) / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 2e-3] + [3e-3] * 6)
