"""micro/claims.py: runs by name, what is made and what is skipped, verdicts, and the claims.

Nothing is trained or sampled here: a stub stands where the commands would run.
"""

import json
import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data.datasets import read_examples
from hub.errors import InputError
from hub.options import MICRO_BASE, MICRO_DATA
from micro import (
    claim_data,
    claims,
    experiments,
    failures,
    further_claims,
    paper_claims,
    pretrain,
    verdicts,
    why_claims,
)
from micro.claim_parts import base, figure_of, gain, grpo, overall, row, sft
from micro.experiments import Cell, Dataset, Place, Run
from micro.schedule import make_all, print_plan, tasks_for
from micro.verdicts import FAILS, HOLDS, MISSING, NO_CASE, UNDECIDED, Bound, Claim, judge
from micro.world import TEST_BUCKETS, bucket, draw_question
from model import Qwen2_5_VL
from rewards import accuracy_reward

RESTATED = "#1+1#2+1#3+1#4+1#5+1"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that were run, each by a stub that leaves what a real one leaves."""
    ran = []

    def call(words: list[str], log: Path, lock: int) -> None:
        ran.append(words[1:])
        out = Path(words[words.index("--out") + 1])
        if words[1].endswith("evaluate.py"):
            start, end = words.index("--data") + 1, words.index("--out")
            files = [word for word in words[start:end] if not word.startswith("--")]
            out.write_text(
                "".join(json.dumps(answer) + "\n" for f in files for answer in answers(f))
            )
        elif words[1].endswith(("sft.py", "grpo.py")):
            (out / "model").mkdir(parents=True, exist_ok=True)
            (out / "checkpoint").mkdir(exist_ok=True)
        else:
            out.mkdir(parents=True, exist_ok=True)

    def answers(file: str) -> list[dict]:
        fields = {"file": file, "domain": "A", "extracted": "5", "vote": "5", "forced": False}
        fields |= {"words": 1, "tokens": 50, "run": 0}
        endings = {2: ("stop", True), 3: ("stop", False), 4: ("length", False), 5: ("stop", True)}
        return [
            fields
            | {"id": f"q{k}", "meta": {"depth": k, "form": "3" + "+1" * k}, "correct": right}
            | {"finish_reason": end, "response": f"<think>3{RESTATED[: 4 * k]};3;#1+1=4;</think>"}
            for k, (end, right) in endings.items()
        ]

    monkeypatch.setattr(experiments, "call", call)
    return ran


# Names


def test_a_name_says_what_a_run_is():
    start = base(0)
    assert start.name == "0-base" and base(3, width=64).name == "3-base,width=64"
    run = grpo(sft(start, answer_only=True), Dataset("med"), kl_coef=0.01, normalize_std=False)
    assert run.name == "0-base+sft,answer_only+grpo,data=med,kl_coef=0.01,normalize_std=False"
    assert run == replace(run, data=Dataset("med", lambda place: []))  # its name is what counts
    assert run != replace(run, seed=1) and sft(base(1)).name != sft(base(0)).name


def test_the_base_of_seed_0_is_the_shipped_one(place):
    assert base(0).done(place) and base(0).model(place) == MICRO_BASE and base(0).minutes == 0
    for other in (base(1), base(0, width=64)):
        assert not other.done(place) and other.model(place) == place.out / other.name / "model"
        assert other.minutes > 1 and other.cores == 2


def test_different_models_of_the_claims_have_different_names():
    runs = {}
    for claim in claims.CLAIMS:
        for seed in claim.seeds:
            for task in tasks_for([claim.needs(seed)], Place(Path("nowhere"))):
                if isinstance(task, Run):
                    assert runs.setdefault(task.name, task) == task
                    assert len(task.name) < 200  # a file's name may have 255 bytes
    assert len(runs) > 100


# Making


def test_a_run_is_made_once(place, commands):
    run = sft(base(0), max_steps=3, answer_only=True, epochs=2)
    run.make(place)
    run.make(place)
    assert len(commands) == 1 and run.done(place)
    words = commands[0]
    assert words[0].endswith("sft.py") and words[-1] == "--overwrite"
    assert words[1:8] == ["--seed", "0", "--max-steps", "3", "--answer-only", "--epochs", "2"]
    assert words[words.index("--model") + 1] == str(MICRO_BASE) and "--data" not in words
    assert not (run.folder(place) / "checkpoint").exists()  # a finished run needs none
    done = json.loads((run.folder(place) / "done.json").read_text())
    assert done.keys() == {"commit", "date", "torch", "machine", "minutes"}


def test_an_interrupted_run_goes_on(place, commands):
    run = grpo(sft(base(0)), normalize_std=False)
    (run.folder(place) / "checkpoint" / "step-000020.tmp").mkdir(parents=True)
    assert run.command(place)[-1] == "--overwrite"  # killed before its first checkpoint was whole
    (run.folder(place) / "checkpoint" / "step-000020").mkdir()
    run.make(place)
    assert commands[0][-1] == "--resume" and "--no-normalize-std" in commands[0]
    assert commands[0][commands[0].index("--model") + 1].endswith("0-base+sft/model")


def test_distilling_and_pretraining_have_commands_of_their_own(place):
    [distilled] = {run for run in tasks_for([paper_claims.MED.needs(1)], place)
                   if isinstance(run, Run) and run.script == "tools/distill.py"}  # fmt: skip
    words = distilled.command(place)
    assert words[-1] == "--overwrite" and words[words.index("--data") + 1].endswith("med.jsonl")
    distilled.folder(place).mkdir(parents=True)
    (distilled.folder(place) / "distilled.samples.jsonl").touch()
    assert distilled.command(place)[-1] == "--resume"
    words = base(2, image_share=0.2).command(place)[2:]
    assert words[:4] == ["--seed", "2", "--image-share", "0.2"]
    assert words[4] == "--out" and words[5].endswith("2-base,image_share=0.2/model")


def test_cells_of_a_model_are_made_in_one_go_and_kept(place, commands):
    tests = [Dataset("test_text"), Dataset("test_image")]
    cells = [Cell(base(0), test, (("temperature", 0.3),)) for test in tests]
    [task] = tasks_for([cells, cells], place)
    task.make(place)
    [words] = commands
    assert words[1:3] == ["--temperature", "0.3"] and str(MICRO_BASE) in words
    figures = cells[1].read(place)
    assert figures["accuracy"] == 0.5 and figures["endless"] == 0.25 and figures["n"] == 4
    assert figures["beyond"]["accuracy"] == pytest.approx(1 / 3) and figures["beyond"]["n"] == 3
    assert figures["by_depth"] == {"2": 1.0, "3": 0.0, "4": 0.0, "5": 1.0}
    assert figures["failures"]["stopped early"] == pytest.approx(2 / 3)  # of k = 3 and 4
    assert figures["correct"] == {"q2": [1], "q3": [0], "q4": [0], "q5": [1]}
    assert not list(cells[0].path(place).parent.glob("*records.jsonl*"))
    assert tasks_for([cells], place) == []
    assert len(tasks_for([[cells[0], replace(cells[0], options=())]], place)) == 1


def test_what_a_probe_finds_is_kept_by_the_model(place, monkeypatch):
    def call(words: list[str], log: Path, lock: int) -> None:
        assert words[1].endswith("micro/stopping.py") and "--count" not in words
        assert words[words.index("--model") + 1] == str(run.model(place))
        assert words[words.index("--seed") + 1] == "0"
        out = Path(words[words.index("--out") + 1])
        out.write_text(json.dumps({"the model": {"own": {"A text": [0.5, 0.75, 1.0, 0.9]}}}))

    monkeypatch.setattr(experiments, "call", call)
    run = base(0)
    probe = experiments.Probe("micro/stopping.py", run)
    [task] = tasks_for([[probe, probe]], place)
    assert task == probe and not task.done(place)
    assert make_all([task], place, 2) == [] and task.done(place)
    assert why_claims.probed(run, "own")["A text"].read(place) == 100.0
    smoke = Place(place.out / "smoke", smoke=True)
    monkeypatch.setattr(experiments, "call", lambda words, *_: smoke_words.extend(words))
    smoke_words: list[str] = []
    probe.make(smoke)
    assert smoke_words[-2:] == ["--count", "20"]


def test_what_a_run_needs_is_made_before_it(place, commands):
    final = grpo(sft(base(1)))
    tasks = tasks_for([[Cell(final, Dataset("test_text"))], [sft(base(1)), final]], place)
    assert [task.name for task in tasks] == [
        "1-base",
        "1-base+sft",
        "1-base+sft+grpo",
        "1-base+sft+grpo: test_text",
    ]
    calls = []
    assert make_all(tasks, place, 2, lambda: calls.append(0)) == []
    assert len(commands) == len(calls) == 4 and all(task.done(place) for task in tasks)
    assert make_all(tasks, place, 2) == [] and len(commands) == 4


def test_two_runs_go_at_a_time_and_a_base_goes_alone(place, monkeypatch):
    """The stub of a run waits for another one to be there; that of a base looks for none."""
    together = threading.Barrier(2)
    running, seen = [], []

    def call(words: list[str], log: Path, lock: int) -> None:
        running.append(words[1])
        if words[1].endswith("pretrain.py"):
            seen.append(list(running))
        else:
            together.wait(timeout=30)
        running.remove(words[1])

    monkeypatch.setattr(experiments, "call", call)
    groups = [[base(1), base(2), sft(base(1)), sft(base(2))]]
    assert make_all(tasks_for(groups, place), place, 2) == []
    assert len(seen) == 2 and all(len(names) == 1 for names in seen)


def test_the_plan_goes_seed_by_seed_and_has_the_bases_first(place):
    pairs = claims.pair_up((further_claims.READING, further_claims.SIZE), [1, 0])
    tasks = claims.plan(pairs, place)
    order = [(task.seed, task.cores) for task in tasks]
    # Seed 0 has four bases to make: two that see fewer images, two of other widths. 1 has five.
    assert order[:5] == [(0, 2)] * 4 + [(0, 1)]
    later = order[order.index((1, 2)) :]
    assert later[:6] == [(1, 2)] * 5 + [(1, 1)] and {seed for seed, _ in later} == {1}
    for i, task in enumerate(tasks):
        assert all(run.is_shipped or run in tasks[:i] for run in task.needs)


def test_a_failure_stops_only_what_needs_it(place, monkeypatch, capsys):
    def call(words: list[str], log: Path, lock: int) -> None:
        if "--answer-only" in words:
            raise experiments.Failed(f"exit code 2; see {log}")

    monkeypatch.setattr(experiments, "call", call)
    bad, good = sft(base(0), answer_only=True), sft(base(0))
    failed = make_all(tasks_for([[grpo(bad), grpo(good)]], place), place, 2)
    assert grpo(good).done(place) and not bad.done(place)
    assert failed[0].startswith("0-base+sft,answer_only: exit code 2; see ")
    assert failed[1] == "0-base+sft,answer_only+grpo: not made, it needs what has failed"
    assert len(failed) == 2 and "failed: 0-base+sft,answer_only" in capsys.readouterr().out


def test_a_command_that_fails_is_said_with_its_log(tmp_path):
    with experiments.locked(tmp_path / "folder" / "lock") as lock:
        with pytest.raises(experiments.Failed, match="exit code 3; see .*log.txt"):
            experiments.call(["sh", "-c", "echo why; exit 3"], tmp_path / "log.txt", lock)
    assert "why" in (tmp_path / "log.txt").read_text()


def test_plan_says_what_is_left(place, commands, capsys):
    tasks = tasks_for([[grpo(sft(base(0)))]], place)
    tasks[0].make(place)
    print_plan(tasks, place, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["done", "0-base+sft"]
    assert lines[1].split() == ["2.5", "0-base+sft+grpo"]
    assert "1 of 2 runs are done; about 1 minutes are left" in lines[3]


# Data


def test_chains_hesitate_the_longer_the_deeper_they_are(place):
    response = "<think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>"
    assert claim_data.hesitating(response, 0) == response
    assert claim_data.hesitating(response, 2) == response.replace("</think>", "..</think>")
    for one in read_examples(claim_data.hesitating_chains().make(place)):
        low = 6 * (one.meta["depth"] - 2)
        assert low <= one.response.count(".") < low + 6
        assert accuracy_reward(one.response, one.answer)


def test_chains_pause_behind_the_start_and_each_step(place):
    response = "<think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>"
    paused = "<think>3#1+4#2-2;3;...#1+4=7;...#2-2=5;...</think><answer>5</answer>"
    assert claim_data.pausing(response, 0) == response
    assert claim_data.pausing(response, 3) == paused
    for one in read_examples(claim_data.pausing_chains(3).make(place)):
        assert one.response.count("...") == one.meta["depth"] + 1 and "...#1" in one.response
        assert accuracy_reward(one.response, one.answer)


def test_a_mix_has_the_share_that_its_name_says():
    special = [{"id": "x", "question": "?", "answer": "1", "meta": {}}] * 70
    general = [{"id": "y", "question": "!", "answer": "2", "response": "r", "depth": 3}] * 100
    for (part, whole), count in (((0, 1), 0), ((1, 8), 10), ((1, 2), 70)):
        mixed = claim_data.mix(special, general, (part, whole))
        assert len(mixed) == 70 + count and sum("response" in one for one in mixed) == count
        assert len({one["id"] for one in mixed}) == len(mixed)
        assert not any("depth" in one or "meta" in one for one in mixed)


def test_data_that_is_written_can_be_read(place):
    direct = claim_data.asked_directly("test_image").make(place)
    first = next(iter(read_examples(direct)))
    assert first.question.startswith("Answer: ") and Path(first.images[0]).exists()
    other = list(read_examples(claim_data.questions_of("L").make(place)))
    assert len(other) == 1600 and {one.domain for one in other} == {"L"}
    worked = list(read_examples(claim_data.hesitating_chains().make(place)))
    assert {one.meta["depth"] for one in worked} == {2, 3, 4, 5, 6}
    lessons = list(read_examples(claim_data.lessons(1).make(place)))
    assert lessons[0].domain == "G" and "</think>" in lessons[0].response
    for one in (*other, *worked, *lessons):
        assert bucket(one.meta["form"]) not in TEST_BUCKETS
    assert claim_data.shipped("rl").path(place) == MICRO_DATA / "rl.jsonl"


def test_a_base_of_another_width_that_sees_fewer_images(tmp_path, monkeypatch):
    shares = []
    for name in ("ALIGN_STEPS", "TEXT_STEPS", "MIXED_STEPS", "FINAL_STEPS"):
        monkeypatch.setattr(pretrain, name, 1)
    for name, value in {"BATCH": 4, "ALIGN_IMAGES": 2}.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "report", lambda *_: {"nothing": {"measured": 0.0}})
    make_row = pretrain.make_row

    def note(rng, tokenizer, mix):
        shares.append(mix.images)
        return make_row(rng, tokenizer, mix)

    monkeypatch.setattr(pretrain, "make_row", note)
    options = ["--width", "64", "--image-share", "0.2", "--processes", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *options])
    pretrain.main()
    assert shares == [0.0] * 4 + [0.2] * 8  # text, then mixed and final
    model = Qwen2_5_VL.from_pretrained(tmp_path)
    assert model.config.hidden_size == 64 and model.config.vision.out_hidden_size == 64


# Failures


@pytest.mark.parametrize(
    "response, name",
    [
        ("<answer>5</answer>", "no thoughts"),
        ("<think>3#1+4#2-1;3;#1+4=7;#2-1=6;</think><answer>6</answer>", "misread"),
        ("<think>3#1+4#2-2;3;#1+4=8;#2-2=6;</think><answer>6</answer>", "wrong step"),
        ("<think>3#1+4#2-2;4;#1+4=8;</think><answer>8</answer>", "wrong step"),
        ("<think>3#1+4#2-2;3;#2-2=1;</think><answer>1</answer>", "out of order"),
        ("<think>3#1+4#2-2;3;#1+4=7;#1+4=1;#2-2=9;</think><answer>9</answer>", "out of order"),
        ("<think>3#1+4#2-2;3;#1+4=7;#1+4=2;</think><answer>2</answer>", "wrong step"),
        ("<think>3#1+4#2-2;3;#1+4=7;#3+4=1;</think><answer>1</answer>", "wrong step"),
        ("<think>3#1+4#2-2;3;#1+4=7;</think><answer>7</answer>", "stopped early"),
        ("<think>3#1+4#2-2;3;#1+4=7;#2-2=5;#2-2=3;</think><answer>3</answer>", "went on"),
        ("<think>3#1+4#2-2;3;#1+4=7;#2-2=5;#1+4=9;", "went on"),
        ("<think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>4</answer>", "wrong answer"),
        ("<think>3#1+4#2-2;3;#1+4=7;", "wrong step"),  # cut before any end
    ],
)
def test_what_a_wrong_answer_is_put_down_to(response, name):
    assert failures.failure(response, failures.parse_form("3+4-2", "A")) == name


def test_a_form_says_its_question():
    rng = random.Random(0)
    for i in range(60):
        domain = "ALG"[i % 3]
        question = draw_question(rng, domain, 2 + i % 4)
        again = failures.parse_form(question.form, domain)
        assert again.form == question.form and again.chain() == question.chain()


# Verdicts


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([5.0, 5.0, 5.0], HOLDS),  # at the limit, without a doubt
        ([4.9, 4.9, 4.9], FAILS),
        ([7.0, 7.5, 8.0], HOLDS),  # 7.5 +- 0.29
        ([4.0, 6.0, 8.0], UNDECIDED),  # 6 +- 1.15: the limit is within two standard errors
        ([2.0, 4.0, 6.0], UNDECIDED),
        ([1.0, 2.0, 3.0], FAILS),  # 2 +- 0.58
        ([5.1], HOLDS),  # one seed has no error
        ([4.9], FAILS),
    ],
)
def test_verdict_on_at_least(values, verdict):
    assert judge(values, Bound("", None, at_least=5)) == verdict
    mirrored = Bound("", None, at_most=-5)
    assert judge([-value for value in values], mirrored) == verdict


@pytest.mark.parametrize(
    "figures, verdict",
    [
        ([None], NO_CASE),
        ([None, None], NO_CASE),
        ([9.0, None, None], UNDECIDED),  # one of three: its error is not known
        ([1.0, None], UNDECIDED),
        ([7.0, None, 8.0], HOLDS),
        ([1.0, None, 2.0], FAILS),
    ],
)
def test_verdict_where_some_seeds_have_no_case(figures, verdict):
    assert judge(figures, Bound("", None, at_least=5)) == verdict


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([0.0, 1.0, -1.0], HOLDS),
        ([2.5, 3.0, 2.0], UNDECIDED),
        ([4.0, 4.5, 5.0], FAILS),
        ([-4.0, -4.5, -5.0], FAILS),
        ([9.0, -9.0], UNDECIDED),
    ],
)
def test_verdict_between_two_limits(values, verdict):
    assert judge(values, Bound("", None, -3, 3)) == verdict


def test_two_standard_errors_are_the_border():
    values = [6.0, 8.0]  # 7 +- 1
    mean, error = verdicts.mean_and_error(values)
    assert (mean, error) == (7.0, 1.0)
    assert judge(values, Bound("", None, at_least=5)) == HOLDS
    assert judge(values, Bound("", None, at_least=5.01)) == UNDECIDED
    assert judge(values, Bound("", None, at_least=9)) == UNDECIDED
    assert judge(values, Bound("", None, at_least=9.01)) == FAILS
    assert math.isnan(verdicts.mean_and_error([1.0])[1])


def test_a_claim_is_as_good_as_its_weakest_bound():
    assert verdicts.weakest([HOLDS, HOLDS]) == HOLDS
    assert verdicts.weakest([HOLDS, UNDECIDED]) == UNDECIDED
    assert verdicts.weakest([UNDECIDED, FAILS, HOLDS]) == FAILS


def test_a_bound_without_a_case_hides_no_other():
    assert verdicts.weakest([NO_CASE, HOLDS]) == HOLDS
    assert verdicts.weakest([HOLDS, NO_CASE, FAILS]) == FAILS
    assert verdicts.weakest([NO_CASE]) == NO_CASE


# The claims


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
def test_bounds_are_of_figures_that_the_claim_measures(claim):
    """Every bound can be computed from the claim's table, and none twice."""
    rows = claim.table(claim.seeds[0])
    table = {
        name: dict.fromkeys(figures, 7.0 * number)
        for number, (name, figures) in enumerate(rows.items())
    }
    for bound in claim.bounds:
        assert math.isfinite(bound.figure(table)) and bound.limits
    assert len({bound.text for bound in claim.bounds}) == len(claim.bounds)
    assert claim.refuted and len(claim.seeds) >= 3
    assert all(figure.needs for figures in rows.values() for figure in figures.values())


def test_the_claims_of_the_issue_are_there():
    assert [claim.name for claim in claims.CLAIMS] == [
        "thoughts",
        "forced-exit",
        "anchor",
        "stages",
        "samples",
        "masked",
        "med",
        "dynamics",
        "med-mixed",
        "reading",
        "size",
        "variants",
        "failures",
        "stopping",
        "decisions",
        "clock",
        "form",
    ]
    assert [c.name for c in claims.choose(None, quick=True)] == [
        c.name for c in claims.CLAIMS if c.name not in ("reading", "size", "variants")
    ]
    with pytest.raises(InputError, match="--claim magic: there is no such claim; thoughts, "):
        claims.choose(["magic"], quick=False)


def cell_file(place: Place, cell: Cell, verdicts_by_id: dict[str, list[int]], right: float = 0.5):
    path = cell.path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {"accuracy": right, "correct": verdicts_by_id}
    path.write_text(json.dumps(figures))


def test_text_solvable_questions_are_left_out(place):
    """Question a is solved without its image, always, by the base alone: the rest are b and c."""
    rows = paper_claims.masked(0)
    blind = [{"a": [1, 1, 1], "b": [1, 0, 1], "c": [0, 0, 0]}, {k: [0, 0, 0] for k in "abc"}]
    shown = [{"a": [1], "b": [0], "c": [0]}, {"a": [1], "b": [1], "c": [0]}]
    needs = rows["base"]["A image, the rest"].needs
    for cell, correct in zip(needs, shown + blind):
        cell_file(place, cell, correct)
    assert [dict(cell.options).get("mask_images") for cell in needs] == [None, None, True, True]
    assert rows["base"]["A image, the rest"].read(place) == 0.0
    assert rows["SFT + RL"]["A image, the rest"].read(place) == 50.0


def test_prediction_is_reading_times_reasoning():
    table = {
        "image_share 0.2: base": {"reading": 50.0},
        "image_share 0.2: SFT + RL": {"A text": 90.0, "A image": 53.0},
    }
    assert further_claims.over_prediction(0.2)(table) == pytest.approx(53 - (0.5 * 90 + 0.5 * 10))


def test_dynamics_are_means_over_steps_that_were_measured(place):
    run = paper_claims.DYNAMICS.curves(1)
    run.folder(place).mkdir(parents=True)
    records = []
    for step in range(1, 201):
        record = dict.fromkeys(paper_claims.PANELS, 0.0)
        records.append(record | {"step": step, "reward": step / 200, "entropy": None})
    records[-1]["entropy"] = 0.5
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run.folder(place) / "metrics.jsonl").write_text(text)
    table = claims.read_table(paper_claims.DYNAMICS, 1, place)
    assert table["steps 1 to 20"]["reward, %"] == pytest.approx(100 * 10.5 / 200)
    assert table["last 20"]["entropy, 0.001 nats"] == 500.0
    curves = claims.read_curves(paper_claims.DYNAMICS, 1, place)
    assert curves["reward"][0] == pytest.approx(3 / 200) and len(curves["reward"]) == 40
    assert curves["entropy"][-2:] == [None, 0.5]


# The command


@pytest.fixture
def small(monkeypatch, tmp_path) -> Claim:
    """A claim of two cells, as the only one; results and page go to a temporary folder."""

    def table(seed: int):
        return {"base": row(base(seed), ("A text",)), "SFT": row(sft(base(seed)), ("A text",))}

    bounds = (Bound("gain", gain("SFT", "base", "A text"), at_most=0),)
    claim = Claim("small", "Table 0", "Nothing is gained.", "a gain.", table, bounds)
    monkeypatch.setattr(claims, "CLAIMS", (claim,))
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims, "PAGE", tmp_path / "claims.md")
    monkeypatch.setattr(claims, "DIGEST", tmp_path / "results.md")
    first, last = claims.MARKS
    claims.DIGEST.write_text(f"Before.\n{first}stale\n{last}After.\n")
    return claim


def test_the_command_measures_what_is_missing_and_reports(small, tmp_path, commands, capsys):
    out = ["--out", str(tmp_path / "runs")]
    claims.main(["--summary", *out])
    assert "| Nothing is gained. | - | **not measured** |" in capsys.readouterr().out
    claims.main(["--seeds", "0", *out])
    assert "**holds (1 of 3 seeds)**" in (tmp_path / "claims.md").read_text()
    before = len(commands)
    claims.main(["--seeds", "0", "1", *out])  # adds a seed: its base, its SFT, two evaluations
    assert len(commands) - before == 4
    page = (tmp_path / "claims.md").read_text()
    assert "| Nothing is gained. | 0 1 | **holds (2 of 3 seeds)** |" in page
    assert "| SFT | 33.3 +- 0.0 |" in page and "| gain | at most 0 | 0.0 +- 0.0 | 0.0 0.0 |" in page
    # The verdicts stand between the marks of the other page, whose text stays.
    short = (tmp_path / "results.md").read_text()
    assert short.startswith("Before.\n<!--") and short.endswith("-->\nAfter.\n")
    claim = "| [small](claims.md#small): Nothing is gained. | Table 0 | 0 1 |"
    assert f"{claim} **holds (2 of 3 seeds)** | 1 of 1 bounds hold |" in short
    assert "stale" not in short
    claims.main(["--summary"])
    assert len(commands) - before == 4


def test_quick_and_smoke_leave_the_committed_results_alone(small, tmp_path, commands, capsys):
    claims.main(["--quick", "--out", str(tmp_path / "runs")])
    claims.main(["--smoke", "--seeds", "1", "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "results").exists() and not (tmp_path / "claims.md").exists()
    assert "stale" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "runs" / "claims.md").exists()
    smoke = [words for words in commands if "/runs/smoke/" in " ".join(words)]
    assert all(("--max-steps" in words) or ("--limit" in words) for words in smoke)
    assert (tmp_path / "runs/smoke/1-base/model/model.safetensors").exists()  # the shipped one


def made_up(*bounds: Bound, **options) -> Claim:
    """Returns a claim of one figure, r c, that a table gives as it is."""

    def table(seed: int):
        return {"r": {"c": None}}

    return Claim("c", "Table 0", "It is so.", "it is not.", table, bounds, **options)


def results_of(**figures: float) -> dict[str, dict]:
    """Returns results of these seeds (s0=1.0), as they are read."""
    return {
        name[1:]: {"table": {"r": {"c": figure}}, "sources": ["here"]}
        for name, figure in figures.items()
    }


def the_figure(t):
    return t["r"]["c"]


def test_in_short_what_does_not_hold_is_said():
    claim = made_up(Bound("first", the_figure, at_most=3), Bound("second", the_figure, at_least=3))
    tables = verdicts.tables_of(claim, results_of(s0=1.0, s1=1.0))
    words = "second: 1.0 +- 0.0 (at least 3): does not hold<br>1 of 2 bounds hold"
    assert verdicts.in_short(claim, tables) == words


def test_seeds_that_were_seen_before_are_shown_and_not_judged():
    claim = made_up(Bound("b", the_figure, at_least=3), looked_at=(0,))
    verdict = partial(verdicts.verdict_of, claim)
    tables = verdicts.tables_of(claim, results_of(s0=9.0, s1=2.0, s2=2.0))
    assert verdict(tables) == FAILS
    assert verdicts.each_seed(claim.bounds[0], claim, tables) == "(9.0) 2.0 2.0"
    assert verdict({0: tables[0], 1: tables[1]}) == f"{FAILS} (1 of 2 seeds)"
    assert verdict({0: tables[0]}) == f"{HOLDS} (on seeds that were seen before)"
    assert verdict({}) == MISSING


def test_a_remark_stands_beside_all_its_seeds_only():
    """It was written on all of them: one alone might say otherwise."""
    claim = made_up(Bound("b", the_figure, at_least=3), looked_at=(0,), remark="Seed 2 is odd.")
    whole = "\n".join(verdicts.section(claim, results_of(s0=9.0, s1=2.0, s2=2.0)))
    alone = "\n".join(verdicts.section(claim, results_of(s0=9.0)))
    assert f"Verdict: **{FAILS}**. Seed 2 is odd." in whole and "In brackets: " in whole
    assert "| 9.0 | 9.0 | holds |" in alone
    assert "odd" not in alone and "In brackets: " not in alone


def test_only_tables_of_the_claim_as_it_is_count():
    """Not those of other seeds, nor those that an earlier version of the claim left."""
    claim = made_up(Bound("b", the_figure, at_least=3))
    results = results_of(s0=1.0, s1=2.0, s7=3.0)
    results["1"]["table"]["another"] = {"c": 5.0}
    assert verdicts.tables_of(claim, results) == {0: {"r": {"c": 1.0}}}


def test_a_seed_with_nothing_to_judge_is_left_out():
    claim = made_up(Bound("b", lambda t: the_figure(t) or None, at_least=3))
    tables = verdicts.tables_of(claim, results_of(s0=0.0, s1=4.0, s2=4.0))
    assert verdicts.verdict_of(claim, tables) == HOLDS
    assert verdicts.each_seed(claim.bounds[0], claim, tables) == "- 4.0 4.0"
    nothing = verdicts.tables_of(claim, results_of(s0=0.0, s1=0.0, s2=0.0))
    assert verdicts.verdict_of(claim, nothing) == NO_CASE


def test_two_writers_of_a_claim_lose_no_seed(tmp_path):
    claim = made_up()
    results = results_of(s0=1.0)["0"]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda seed: verdicts.write_results(tmp_path, claim, seed, results), range(8))
        )
    assert list(verdicts.read_results(tmp_path, claim)) == [str(seed) for seed in range(8)]


def test_the_committed_pages_are_what_the_committed_results_say():
    page = claims.PAGE.read_text(encoding="utf-8")
    assert page == claims.INTRODUCTION + verdicts.report(claims.CLAIMS, claims.RESULTS)
    text = claims.DIGEST.read_text(encoding="utf-8")
    short = verdicts.digest(claims.CLAIMS, claims.RESULTS, "claims.md")
    assert all(text.count(mark) == 1 for mark in claims.MARKS)
    assert claims.insert(text, short) == text


@pytest.mark.parametrize("order", [(0,), (1,), (), (1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1)])
def test_a_page_without_its_two_marks_is_left_alone(order):
    text = "before" + "".join(f"{claims.MARKS[i]}old\n" for i in order)
    with pytest.raises(InputError, match="needs its two marks there"):
        claims.insert(text, "new\n")


def test_seeds_that_no_claim_states_are_refused():
    both = (paper_claims.THOUGHTS, further_claims.SIZE)  # of five and of three seeds
    pairs = claims.pair_up(both, [4, 2])
    assert [(claim.name, seed) for claim, seed in pairs] == [
        ("thoughts", 2),
        ("size", 2),
        ("thoughts", 4),
    ]
    with pytest.raises(InputError, match="--seeds 7: it is stated by no claim"):
        claims.pair_up(both, [2, 7])


def test_a_failure_ends_with_a_line(small, tmp_path, monkeypatch, capsys):
    def call(words: list[str], log: Path, lock: int) -> None:
        raise experiments.Failed(f"exit code 2; see {log}")

    monkeypatch.setattr(experiments, "call", call)
    with pytest.raises(InputError, match="3 failed: .*0-base\\+sft: exit code 2; see "):
        claims.main(["--quick", "--out", str(tmp_path / "runs")])
    assert "**not measured**" in (tmp_path / "runs" / "claims.md").read_text()


def test_results_that_are_none_are_refused(small, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.json").write_text("{}")
    with pytest.raises(InputError, match="small.json: no results of micro/claims.py"):
        claims.main(["--summary"])


def test_a_figure_reads_its_cell(place):
    figure = figure_of(base(0), Dataset("test_text"), overall, runs=5)
    [cell] = figure.needs
    cell_file(place, cell, {}, right=0.25)
    assert cell.options == (("runs", 5),) and figure.read(place) == 25.0
