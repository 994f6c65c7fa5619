"""Rejection-sampling distillation: what is kept, in which form, and whole runs."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import sft
import tiny
from data import Example, InputError, read_examples
from hub.options import MICRO_BASE, MICRO_DATA, ROOT
from sample import Completion, Sampler
from tools import distill
from tools.distill import as_written, chosen, judge

# --- The form ---


@pytest.mark.parametrize(
    "response, written",
    [
        (
            "<think>so</think><answer>4</answer>",
            "<think>so</think><answer>4</answer>",
        ),  # ours: as it is
        (
            " <think>\nso\n</think> <answer>B: No</answer>\n",
            "<think>\nso\n</think> <answer>B: No</answer>",
        ),
        (
            "So it is 4.\n</think>\n\n**Answer:** \\boxed{4}",
            "<think>\nSo it is 4.\n</think> <answer>4</answer>",
        ),  # QwQ
        (
            "<think>\nSo it is 4.\n</think>\n\nThe answer is \\boxed{\\frac{1}{2}}.",
            "<think>\nSo it is 4.\n</think> <answer>\\frac{1}{2}</answer>",
        ),
        (
            "so</think><answer>4</answer>",
            "<think>\nso\n</think> <answer>4</answer>",
        ),  # the opening tag is in the prompt
        ("<think>so</think> It is <answer>4</answer>.", "<think>\nso\n</think> <answer>4</answer>"),
        ("<think></think><answer>4</answer>", None),  # no thoughts
        ("\\boxed{4}", None),  # no end of thoughts
        ("<think>so", None),
        ("<think>so</think>", None),  # no answer
        ("<think>so</think>\\boxed{4}</think>\\boxed{5}", None),
        ("a <think> b</think>\\boxed{4}", None),
        ("<think>so</think><answer>4</answer><answer>5</answer>", None),
        ("<think>the example says <answer>B</answer></think><answer>A</answer>", None),
        ("", None),
    ],
)
def test_as_written(response, written):
    assert as_written(response) == written


@pytest.mark.parametrize(
    "text, finish_reason, reason",
    [
        ("<think>so</think><answer>B</answer>", "stop", None),
        ("<think>so</think><answer>B: No</answer>", "stop", None),
        ("<think>so</think><answer>No</answer>", "stop", None),
        ("so\n</think>\n\nThe answer is \\boxed{B}.", "stop", None),
        ("<think>so</think><answer>A</answer>", "stop", "wrong"),
        ("<answer>B</answer>", "stop", "malformed"),
        ("<think>so</think><answer>B</answer>", "length", "unfinished"),
        ("<think>so</think><answer>B</answer>", "forced", "unfinished"),  # its thoughts were cut
    ],
)
def test_judge(text, finish_reason, reason):
    example = Example("q", "Is the earth flat?", "B", {"A": "Yes", "B": "No"})
    assert (
        judge(example, 0, Completion(text=text, finish_reason=finish_reason), "")["reason"]
        == reason
    )


def test_any_right_answer_counts_and_so_does_the_precision():
    example = Example("q", "?", "2.3", accepted=["seven"], precision=1)
    for answer, reason in (("2.3", None), ("2.31", None), ("seven", None), ("2.4", "wrong")):
        completion = Completion(
            text=f"<think>so</think><answer>{answer}</answer>", finish_reason="stop"
        )
        assert judge(example, 0, completion, "")["reason"] == reason


def test_the_first_different_ones_are_chosen():
    texts = [("b", None), ("a", None), ("b", None), ("x", "wrong"), ("c", None)]
    samples = [
        {"sample": i, "text": f"<think>{text}</think><answer>4</answer>", "reason": reason}
        for i, (text, reason) in enumerate(texts)
    ]
    for at_most, numbers in ((1, [0]), (2, [0, 1]), (9, [0, 1, 4])):
        assert [s["sample"] for s in chosen(samples, at_most)] == numbers
    assert chosen(samples[3:4], 5) == []


# --- Whole runs, of a scripted teacher ---

RIGHT, WRONG, BARE = (
    "<think>sum</think><answer>4</answer>",
    "<think>no</think><answer>5</answer>",
    "it is 4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "text")


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    records = [
        {"id": i, "question": f"{i}: 2+2?", "answer": "4", "domain": domain, "level": 3}
        for i, domain in (("a", "sums"), ("b", "sums"), ("c", "words"))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def script(monkeypatch, answers: dict[str, list[str]]) -> None:
    """Has the model answer so: by the question's first letter the texts of its samples.

    All of them stop by themselves.
    """
    original = Sampler.generate

    def scripted(self, prompts, params, *, on_completion, **rest):
        def finish(i, sample, completion):
            question = re.search(r"([a-d]): 2\+2", self.tokenizer.decode(prompts[i].ids))[1]
            completion.text, completion.finish_reason = answers[question][sample], "stop"
            on_completion(i, sample, completion)

        return original(self, prompts, params, on_completion=finish, **rest)

    monkeypatch.setattr(Sampler, "generate", scripted)


def command(folder: Path, questions: Path, out: Path, *arguments: str) -> list[str]:
    return [
        "--model",
        str(folder),
        "--data",
        str(questions),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        *arguments,
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_accept_rates_by_domain_and_what_is_written(
    folder, questions, tmp_path, monkeypatch, capsys
):
    other = RIGHT.replace("sum", "other")
    script(
        monkeypatch,
        {
            "a": [RIGHT, RIGHT, WRONG, other],
            "b": [WRONG, BARE, WRONG, WRONG],
            "c": [BARE, RIGHT, RIGHT, RIGHT],
        },
    )
    out = tmp_path / "sft.jsonl"
    distill.main(command(folder, questions, out, "--n", "4", "--max-per-question", "2"))
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [
        [
            "domain",
            "questions",
            "solved",
            "accepted",
            "wrong",
            "malformed",
            "unfinished",
            "written",
        ],
        ["all", "3", "2", "6", "4", "2", "0", "3"],
        ["sums", "2", "1", "3", "4", "1", "0", "2"],
        ["words", "1", "1", "3", "0", "1", "0", "1"],
    ]
    assert lines(out) == [
        {"id": "a-0", "question": "a: 2+2?", "answer": "4", "response": RIGHT, "domain": "sums"},
        {"id": "a-3", "question": "a: 2+2?", "answer": "4", "response": other, "domain": "sums"},
        {"id": "c-1", "question": "c: 2+2?", "answer": "4", "response": RIGHT, "domain": "words"},
    ]
    assert [(r["id"], r["sample"], r["reason"]) for r in lines(tmp_path / "sft.samples.jsonl")] == [
        ("a", 0, None),
        ("a", 1, None),
        ("a", 2, "wrong"),
        ("a", 3, None),
        ("b", 0, "wrong"),
        ("b", 1, "malformed"),
        ("b", 2, "wrong"),
        ("b", 3, "wrong"),
        ("c", 0, "malformed"),
        ("c", 1, None),
        ("c", 2, None),
        ("c", 3, None),
    ]
    # how many are written does not change what was sampled: another number may be asked for later
    script(monkeypatch, {})
    distill.main(command(folder, questions, out, "--n", "4", "--max-per-question", "1", "--resume"))
    assert [r["id"] for r in lines(out)] == ["a-0", "c-1"]


def test_prefill_and_system_prompt_reach_the_teacher(folder, questions, tmp_path, monkeypatch):
    """QwQ's answers begin inside the thoughts; the prefill stands before every one of them."""
    asked, generate = [], Sampler.generate
    monkeypatch.setattr(
        Sampler,
        "generate",
        lambda self, prompts, params, **rest: (
            asked.extend(self.tokenizer.decode(p.ids) for p in prompts),
            generate(self, prompts, params, **rest),
        )[1],
    )
    script(monkeypatch, {i: ["sum\n</think>\n\n\\boxed{4}"] for i in "abc"})
    out = tmp_path / "sft.jsonl"
    distill.main(
        command(
            folder,
            questions,
            out,
            "--prefill",
            "<think>\n",
            "--system",
            "Think hard.",
            "--prompt-style",
            "train",
        )
    )
    assert asked[0].startswith("system\nThink hard.\nuser\nYou will solve")
    assert asked[0].endswith("assistant\n<think>\n")
    assert [r["response"] for r in lines(out)] == ["<think>\nsum\n</think> <answer>4</answer>"] * 3
    assert (
        lines(tmp_path / "sft.samples.jsonl")[0]["text"] == "<think>\nsum\n</think>\n\n\\boxed{4}"
    )


def test_over_long_and_bad_questions(folder, questions, tmp_path, monkeypatch, capsys):
    """The first are dropped and counted; the others are complained of, or left out if told so."""
    script(monkeypatch, {i: [RIGHT] for i in "abc"})
    with questions.open("a") as file:
        file.write(json.dumps({"id": "d", "question": "why? " * 200, "answer": "4"}) + "\n")
    distill.main(command(folder, questions, tmp_path / "one.jsonl"))
    assert (
        "1 of 4 examples dropped: their prompts do not fit the context of 512 tokens\n"
        in capsys.readouterr().err
    )
    with questions.open("a") as file:
        file.write(
            '{"id": "e", "question": "?"}\n'
            '{"id": "f", "question": "?", "answer": "4", "image": "x.png"}\n'
        )
    with pytest.raises(InputError, match="questions.jsonl: line 5: field 'answer' is missing"):
        distill.main(command(folder, questions, tmp_path / "two.jsonl"))
    distill.main(command(folder, questions, tmp_path / "two.jsonl", "--skip-bad-lines"))
    assert (
        "questions.jsonl: 2 bad records left out" in (error := capsys.readouterr().err)
        and "has an image" in error
    )
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "q.jsonl"], "--out"),
        (["--out", "o.jsonl"], "--data"),
        (["--data", "q.jsonl", "--out", "q.jsonl"], "no such command has written it"),
        (["--data", "q.jsonl", "--out", "o.jsonl", "--prompt-style", "mcq"], "needs options"),
        (["--data", "q.jsonl", "--out", "o.jsonl", "--resume"], "nothing to resume"),
        (["--data", "same.jsonl", "--out", "o.jsonl"], "field 'id' is not unique"),
        (
            ["--data", "q.jsonl", "--out", "mine.jsonl", "--overwrite"],
            "no such command has written it",
        ),
    ],
)
def test_bad_commands(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampler, "generate", lambda *_, **__: pytest.fail("sampled first"))
    Path("q.jsonl").write_text('{"id": "a", "question": "2+2?", "answer": "4"}\n')
    Path("same.jsonl").write_text('{"id": "a", "question": "2+2?", "answer": "4"}\n' * 2)
    Path("mine.jsonl").write_text("mine")
    with pytest.raises(InputError, match=message):
        distill.main(["--model", str(folder), "--device", "cpu", *arguments])
    assert not Path("o.jsonl").exists() and Path("mine.jsonl").read_text() == "mine"


# --- Whole runs, of a teacher that can solve the questions ---


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The micro base's decoder as a text-only Qwen2.5 folder: it answers questions of two steps."""
    folder = tmp_path_factory.mktemp("teacher")
    config = json.loads((MICRO_BASE / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config = {
        k: v
        for k, v in config.items()
        if not k.startswith(("vision_", "image_", "video_", "rope_scaling"))
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MICRO_BASE / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("visual.")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copy(MICRO_BASE / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def solvable(tmp_path_factory) -> Path:
    """12 questions of two steps and 4 of three, which the teacher does not solve."""
    records = [json.loads(line) for line in (MICRO_DATA / "rl.jsonl").read_text().splitlines()[:80]]
    chosen = [r for r in records if r["depth"] == 2][:12]
    chosen += [r for r in records if r["depth"] == 3][:4]
    path = tmp_path_factory.mktemp("data") / "solvable.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in chosen))
    return path


def solve(teacher: Path, questions: Path, out: Path, *arguments: str) -> list[str]:
    return [
        *command(
            teacher, questions, out, "--n", "4", "--max-per-question", "2", "--max-batch", "4"
        ),
        "--max-new-tokens",
        "100",
        *arguments,
    ]


@pytest.fixture(scope="module")
def finished(teacher, solvable, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run: its --out file, and the table that it prints."""
    out, printed = tmp_path_factory.mktemp("finished") / "whole.jsonl", io.StringIO()
    with contextlib.redirect_stdout(printed):
        distill.main(solve(teacher, solvable, out))
    return out, printed.getvalue()


def test_a_text_only_teacher_and_a_student_that_reads_it(finished, solvable, tmp_path):
    out, _ = finished
    written, truths = list(read_examples(out)), {e.id: e for e in read_examples(solvable)}
    solved = {e.id.rpartition("-")[0] for e in written}
    assert len(solved) >= 10 and all(truths[i].meta["depth"] == 2 for i in solved)
    for example in written:
        truth = truths[example.id.rpartition("-")[0]]
        assert (example.question, example.answer) == (truth.question, truth.answer)
        assert example.response.endswith(f"</think><answer>{truth.answer}</answer>")
    sft.main(["--data", str(out), "--out", str(tmp_path / "run"), "--max-steps", "1"])
    (step,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert step["step"] == 1 and step["tokens"] > 0


# The command, which kills itself behind a number of questions.
KILLED = """
import os, signal, sys
from tools import distill
from training.record_file import RecordFile

append, answered = RecordFile.append, []

def append_or_die(file, group):
    append(file, group)
    answered.append(group)
    if len(answered) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

RecordFile.append = append_or_die
distill.main(sys.argv[1:])
"""


def test_kill_9_then_resume_gives_the_same_files(teacher, solvable, finished, tmp_path, capsys):
    (whole, table), out = finished, tmp_path / "killed.jsonl"
    samples = out.with_suffix(".samples.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *solve(teacher, solvable, out)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert done.returncode == -signal.SIGKILL and not out.exists(), done.stderr
    assert samples.read_bytes().count(b"\n") == 16
    distill.main(solve(teacher, solvable, out, "--resume"))
    assert capsys.readouterr().out == table and out.read_text() == whole.read_text()
    assert samples.read_text() == whole.with_suffix(".samples.jsonl").read_text()
    with pytest.raises(InputError, match="cannot resume with other options: --seed was 0"):
        distill.main(solve(teacher, solvable, out, "--resume", "--seed", "1"))
    with pytest.raises(InputError, match="holds results"):
        distill.main(solve(teacher, solvable, out))


def test_ctrl_c_writes_what_is_done(teacher, solvable, finished, tmp_path, monkeypatch):
    """It comes in the middle of the fifth question's samples."""
    out, original, sampled = tmp_path / "sft.jsonl", Sampler.generate, []

    def interrupted(self, prompts, params, *, on_completion, **rest):
        def finish(i, sample, completion):
            on_completion(i, sample, completion)
            sampled.append(i)
            if len(sampled) == 18:
                raise KeyboardInterrupt

        return original(self, prompts, params, on_completion=finish, **rest)

    monkeypatch.setattr(Sampler, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.main(solve(teacher, solvable, out))
    monkeypatch.undo()
    (whole, _), some = finished, lines(out)
    assert 0 < len(some)
    distill.main(solve(teacher, solvable, out, "--resume"))
    assert len(some) < len(lines(out)) and out.read_text() == whole.read_text()
