"""Evaluation: figures of hand-made records, what is asked, and whole runs of the command."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

import evaluate
import tiny
from data import Example, InputError, Prompt
from evaluate import majority, summarise, vote
from hub.options import ROOT
from sample import Sampler


def records(*questions: tuple[list[tuple[str | None, bool]], str | None]) -> list[list[dict]]:
    """Returns the records of questions: the answers of its runs with verdicts, and its domain."""
    return [
        [
            {
                "id": f"q{i}",
                "run": run,
                "domain": domain,
                "extracted": answer,
                "vote": answer,
                "correct": correct,
                "words": 10 * (run + 1),
                "tokens": 20,
                "forced": run == 0,
            }
            for run, (answer, correct) in enumerate(answers)
        ]
        for i, (answers, domain) in enumerate(questions)
    ]


# --- Figures ---


def test_greedy_figures_by_hand():
    """3 of 4 right: the standard error is sqrt(p (1 - p) / (n - 1)) = 1/4."""
    found = summarise(records(*[([("1", True)], "maths")] * 3, ([(None, False)], "medicine")))
    assert (found["n"], found["accuracy"], found["unparsed"], found["forced"]) == (
        4,
        0.75,
        0.25,
        1.0,
    )
    assert (
        found["stderr"] == pytest.approx(0.25)
        and found["mean_words"] == 10.0
        and found["mean_tokens"] == 20.0
    )
    assert found["by_domain"] == {
        "maths": {"n": 3, "accuracy": 1.0, "stderr": 0.0},
        "medicine": {"n": 1, "accuracy": 0.0, "stderr": 0.0},
    }
    assert not any("@" in key for key in found)


def test_figures_of_several_runs_by_hand():
    found = summarise(
        records(
            ([("2", True), ("2.0", True), ("3", False)], None),  # mean 2/3, majority right, passed
            ([("5", False), ("5", False), ("4", True)], None),  # mean 1/3, majority wrong, passed
            (
                [(None, False), (None, False), ("7", True)],
                None,
            ),  # mean 1/3, the one vote is right, passed
            ([("8", False), (None, False), ("9", False)], None),
        )
    )  # 0
    assert found["n"] == 4 and found["accuracy"] == found["avg@3"] == pytest.approx(1 / 3)
    assert (
        found["maj@3"] == 0.5
        and found["pass@3"] == 0.75
        and found["unparsed"] == pytest.approx(3 / 12)
    )
    # over questions, not over answers: 2/3, 1/3, 1/3, 0 deviate by 1/3, 0, 0, -1/3; variance 2/27,
    # over 4 questions
    assert found["stderr"] == pytest.approx((2 / 27 / 4) ** 0.5)
    assert found["mean_words"] == 20.0 and found["forced"] == pytest.approx(1 / 3)
    assert found["avg@3_stderr"] == found["stderr"]
    # 2 of 4 and 3 of 4 right: sqrt(p (1 - p) / (n - 1))
    assert found["maj@3_stderr"] == pytest.approx((0.5 * 0.5 / 3) ** 0.5)
    assert found["pass@3_stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    measures = {k: v for k, v in found.items() if k in ("n", "accuracy", "stderr") or "@" in k}
    assert found["by_domain"] == {"None": measures}  # of one domain they are those of all


def test_one_question_has_no_spread():
    found = summarise(records(([("1", True)], None)))
    assert found["accuracy"] == 1.0 and found["stderr"] == 0.0


@pytest.mark.parametrize(
    "answers, right",
    [
        (
            [("1/2", True), ("0.5", True), ("3", False), ("4", False)],
            True,
        ),  # equivalent answers vote together
        ([("3", False), ("3.0", False), ("0.5", True)], False),  # wrong ones too
        ([("3", False), ("5", True)], False),
        ([("5", True), ("3", False)], True),  # a tie: the earlier one
        ([(None, False)] * 3 + [("5", True)], True),  # unparsed ones do not vote
        ([(None, False), (None, False)], False),
        ([("50%", True), ("50", True), ("7", False), ("7", False)], True),
    ],
)
def test_majority(answers, right):
    assert majority(*records((answers, None))) is right


def test_votes_for_options_go_by_letter():
    example = Example("q", "Is the earth flat?", "B", {"A": "Yes", "B": "No"})
    texts = ("B", "B: No", "No", "(B)", "A: Yes", "C", "maybe")
    assert [vote(f"<think>A</think><answer>{t}</answer>", example) for t in texts] == [
        "B",
        "B",
        "B",
        "B",
        "A",
        None,
        None,
    ]
    assert (
        vote("<answer>B: No</answer>", Example("q", "?", "4")) == "B: No"
        and vote("no tags", example) is None
    )


# --- Whole runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl")


@pytest.fixture
def questions(tmp_path) -> Path:
    """Text of two domains and an image question with options."""
    Image.new("RGB", (56, 56), (200, 30, 90)).save(tmp_path / "dot.png")
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps(record) + "\n"
            for record in (
                {
                    "id": "a",
                    "question": "One and one?",
                    "answer": "2",
                    "domain": "maths",
                    "depth": 1,
                },
                {
                    "id": "b",
                    "question": "Which colour?",
                    "answer": "A",
                    "options": {"A": "red", "B": "blue"},
                    "image": "dot.png",
                    "domain": "art",
                },
                {
                    "id": "c",
                    "question": "Two and two?",
                    "answer": "4",
                    "domain": "maths",
                    "depth": 2,
                },
            )
        )
    )
    return path


@pytest.fixture
def prompts(monkeypatch) -> list:
    """Records the prompts that reach the sampler."""
    seen, original = [], Sampler.generate
    monkeypatch.setattr(
        Sampler,
        "generate",
        lambda self, prompts, params, **rest: (
            seen.append((self.tokenizer, prompts, params)),
            original(self, prompts, params, **rest),
        )[1],
    )
    return seen


def script(monkeypatch, answers: list[list[str]]) -> None:
    """Has the model answer so: a list per question, of its runs' answers."""
    original = Sampler.generate

    def scripted(self, prompts, params, *, on_completion, **rest):
        def finish(i, sample, completion):
            completion.text = f"<think>I think</think><answer>{answers[i][sample]}</answer>"
            on_completion(i, sample, completion)

        return original(self, prompts, params, on_completion=finish, **rest)

    monkeypatch.setattr(Sampler, "generate", scripted)


def run(folder: Path, questions: Path, *arguments: str) -> None:
    evaluate.main(
        [
            "--model",
            str(folder),
            "--data",
            str(questions),
            "--max-new-tokens",
            "4",
            "--device",
            "cpu",
            *arguments,
        ]
    )


def test_json_and_records(folder, questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(folder, questions, "--json", "--out", str(out))
    (line,) = capsys.readouterr().out.splitlines()
    summary = json.loads(line)
    assert {
        "n",
        "accuracy",
        "stderr",
        "unparsed",
        "mean_words",
        "forced",
        "by_domain",
    } <= summary.keys()
    assert (
        summary["file"] == str(questions) and summary["n"] == 3 and summary["unparsed"] == 1.0
    )  # noise: never a right answer
    assert {d: v["n"] for d, v in summary["by_domain"].items()} == {"art": 1, "maths": 2}
    found = [json.loads(text) for text in out.read_text().splitlines()]
    assert [r["id"] for r in found] == ["a", "b", "c"] and [r["meta"] for r in found] == [
        {"depth": 1},
        {},
        {"depth": 2},
    ]
    assert all(
        r.keys()
        == {
            "file",
            "id",
            "run",
            "domain",
            "meta",
            "masked",
            "response",
            "prompt",
            "extracted",
            "vote",
            "answer",
            "correct",
            "finish_reason",
            "forced",
            "tokens",
            "words",
        }
        for r in found
    )
    assert (
        found[1]["prompt"] == "Which colour?\nA: red\nB: blue"
        and found[1]["answer"] == "A"
        and found[1]["correct"] is False
    )
    assert all(r["tokens"] == 4 and r["finish_reason"] == "length" for r in found)


def test_greedy_runs_repeat_and_sampled_ones_differ(folder, questions, tmp_path, capsys):
    texts = []
    for name, arguments in (
        ("a", ()),
        ("b", ()),
        ("c", ("--runs", "3", "--temperature", "1.5")),
        ("d", ("--runs", "3", "--temperature", "1.5")),
        ("e", ("--runs", "3", "--temperature", "1.5", "--seed", "1")),
    ):
        run(folder, questions, "--json", "--out", str(tmp_path / name), *arguments)
        texts.append(
            [
                (r["id"], r["run"], r["response"])
                for r in map(json.loads, (tmp_path / name).read_text().splitlines())
            ]
        )
    assert texts[0] == texts[1] and texts[2] == texts[3] != texts[4]
    assert [(i, r) for i, r, _ in texts[2]] == [(i, r) for i in "abc" for r in range(3)]
    assert len({text for i, _, text in texts[2] if i == "a"}) > 1
    keys = json.loads(capsys.readouterr().out.splitlines()[2]).keys()
    assert {"avg@3", "maj@3", "pass@3"} <= keys


def test_right_answers_are_counted(folder, questions, monkeypatch, capsys):
    """A script plays the model: two answers of three are right, one with an option's text."""
    script(monkeypatch, [["2.0"], ["A: red"], ["5"]])
    run(folder, questions, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["accuracy"] == pytest.approx(2 / 3)
        and summary["unparsed"] == 0.0
        and summary["stderr"] == pytest.approx(1 / 3)
    )
    assert {d: (v["n"], v["accuracy"]) for d, v in summary["by_domain"].items()} == {
        "art": (1, 1.0),
        "maths": (2, 0.5),
    }


def test_images_reach_the_model_unless_masked(folder, questions, prompts):
    run(folder, questions)
    run(folder, questions, "--mask-images")
    (tokenizer, shown, _), (_, masked, _) = prompts
    assert [bool(p.images) for p in shown] == [False, True, False] and shown[1].grids == [(1, 4, 4)]
    assert shown[1].ids.count(tokenizer.image_pad) == 4
    assert all(not p.images and not p.grids for p in masked)
    vision = {tokenizer.image_pad, tokenizer.vision_start, tokenizer.vision_end}
    assert masked[1].ids == [i for i in shown[1].ids if i not in vision] and masked[0] == shown[0]


def test_options_reach_the_sampler(folder, questions, prompts):
    run(
        folder,
        questions,
        "--runs",
        "2",
        "--temperature",
        "0.3",
        "--seed",
        "9",
        "--think-budget",
        "2",
        "--limit",
        "1",
        "--prompt-style",
        "train",
    )
    ((tokenizer, asked, params),) = prompts
    assert len(asked) == 1 and (params.n, params.temperature, params.seed, params.think_budget) == (
        2,
        0.3,
        9,
        2,
    )
    assert "You will solve a problem/request." in tokenizer.decode(asked[0].ids)
    assert (params.max_new_tokens, params.top_p, params.top_k) == (4, 1.0, 0)


def test_forced_exits_are_counted(folder, questions, tmp_path, capsys):
    run(
        folder,
        questions,
        "--json",
        "--think-budget",
        "1",
        "--max-new-tokens",
        "20",
        "--out",
        str(tmp_path / "out"),
    )
    assert json.loads(capsys.readouterr().out)["forced"] == 1.0
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert all(r["forced"] and "</think>" in r["response"] for r in found)


def test_table_has_a_line_per_file(folder, questions, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "q", "answer": "1"}\n{"question": "r", "answer": "2"}\n')
    evaluate.main(
        [
            "--model",
            str(folder),
            "--data",
            str(questions),
            str(other),
            "--max-new-tokens",
            "2",
            "--device",
            "cpu",
            "--runs",
            "2",
            "--temperature",
            "0.3",
        ]
    )
    head, first, art, maths, second = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "file",
        "n",
        "accuracy",
        "avg@2",
        "maj@2",
        "pass@2",
        "unparsed",
        "forced",
        "words",
        "tokens",
        "dropped",
    ]
    assert art.split()[:2] == ["art", "1"] and maths.split()[:2] == [
        "maths",
        "2",
    ]  # of several domains, each one
    assert first.split()[:5] == ["questions", "3", "0.0", "+-", "0.0"] and second.split()[:2] == [
        "other",
        "2",
    ]


def test_batch_size_changes_nothing(folder, questions, tmp_path):
    for size in ("1", "256"):
        run(
            folder,
            questions,
            "--max-batch",
            size,
            "--runs",
            "2",
            "--temperature",
            "1",
            "--out",
            str(tmp_path / size),
        )
    assert (tmp_path / "1").read_text() == (tmp_path / "256").read_text()


def test_text_only_models_are_evaluated_too(questions, tmp_path, capsys):
    folder = tiny.make_folder(tmp_path / "text", "text")
    assert not (folder / "preprocessor_config.json").exists()
    run(folder, questions, "--mask-images", "--json")
    assert json.loads(capsys.readouterr().out)["n"] == 3
    with pytest.raises(InputError, match="no vision tower"):
        run(folder, questions)


@pytest.mark.parametrize(
    "lines, arguments, message",
    [
        (['{"id": "a", "question": "q", "answer": "1"}'] * 2, (), "field 'id' is not unique"),
        (['{"id": "a", "question": "q"}'], (), "field 'answer' is missing"),
        ([], (), "no examples"),
        (
            ['{"id": "a", "question": "q", "answer": "1"}'],
            ("--runs", "5"),
            "--runs above 1 needs a --temperature of 0.01 or more",
        ),
        (
            ['{"id": "a", "question": "q", "answer": "1"}'],
            ("--runs", "3", "--temperature", "1e-6"),
            "greedy runs are the same",
        ),
        (
            ['{"id": "a", "question": "q", "answer": "1"}'],
            ("--think-budget", "4"),
            "--think-budget 4 is never reached: --max-new-tokens is 4",
        ),
        ([r'{"id": "\ud83d", "question": "q", "answer": "1"}'], (), "not valid Unicode"),
        (
            ['{"id": "a", "question": "q", "answer": "1"}'],
            ("--prompt-style", "mcq"),
            "needs options",
        ),
        (['{"id": "a", "question": "q", "answer": "1", "image": "none.png"}'], (), "none.png"),
    ],
)
def test_bad_questions_are_refused_before_anything_is_sampled(
    folder, tmp_path, prompts, lines, arguments, message
):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        run(folder, path, *arguments)
    assert not prompts


def test_limit_stops_before_bad_lines(folder, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "1"}\nnot json\n')
    run(folder, path, "--limit", "1", "--json")
    assert json.loads(capsys.readouterr().out)["n"] == 1
    with pytest.raises(InputError, match="line 2"):
        run(folder, path)


def test_default_files_are_the_four_settings():
    o = evaluate.parse_options(evaluate.EvaluateOptions, [])
    assert [Path(p).name for p in o.data] == [
        "test_text.jsonl",
        "test_image.jsonl",
        "test_text_other.jsonl",
        "test_image_other.jsonl",
    ]
    assert (o.runs, o.temperature, o.prompt_style, o.think_budget) == (1, 0.0, "direct", None)


def test_missing_file_is_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="missing.jsonl: cannot be read"):
        run(folder, tmp_path / "missing.jsonl")


# --- What does not fit, and images ---


def test_prompts_over_the_context_are_dropped_and_counted(folder, tmp_path, capsys, prompts):
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"id": str(i), "question": "why? " * (200 if i == 1 else 1), "answer": "1"}
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(folder, path, "--json", "--out", str(out))
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["n"], summary["dropped"]) == (2, 1)
    assert (
        "q.jsonl: 1 of 3 examples dropped: their prompts do not fit the context of 512 tokens\n"
        in captured.err
    )
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["0", "2"]
    assert len(prompts[0][1]) == 2
    run(folder, path, "--limit", "1", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["dropped"] == 0 and "dropped" not in captured.err


def test_an_image_is_preprocessed_once(folder, questions, monkeypatch):
    """Not when it is read, but when its prompt is run; and once for all runs."""
    preprocessed, original = [], Prompt.pixel_values

    def counted(prompt):
        if prompt.images:
            preprocessed.append(prompt.images)
        return original(prompt)

    monkeypatch.setattr(Prompt, "pixel_values", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *_, **__: None)
        run(folder, questions)
    assert not preprocessed
    run(folder, questions, "--runs", "3", "--temperature", "1")
    assert [len(images) for images in preprocessed] == [1]


# --- Interruptions ---

LONG = "--runs 2 --temperature 1 --max-new-tokens 16 --max-batch 2 --device cpu".split()

# The command, which kills itself behind a number of questions.
KILLED = """
import os, signal, sys
import evaluate
from training.record_file import RecordFile

append, answered = RecordFile.append, []

def append_or_die(file, group):
    append(file, group)
    answered.append(group)
    if len(answered) == 14:
        os.kill(os.getpid(), signal.SIGKILL)

RecordFile.append = append_or_die
evaluate.main(sys.argv[1:])
"""


def write_files(folder: Path) -> list[Path]:
    """Two files of questions, some of them equal but for their id."""
    paths = [folder / "one.jsonl", folder / "two.jsonl"]
    for path in paths:
        lines = [{"id": f"q{i}", "question": f"What is {i % 5}?", "answer": "1"} for i in range(12)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """The folder of the files, which records name."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def files(shelf) -> list[Path]:
    """Written anew: a test may change them."""
    return write_files(shelf)


def command(folder: Path, files: list[Path], out: Path, *arguments: str) -> list[str]:
    return [
        "--model",
        str(folder),
        "--data",
        *map(str, files),
        "--out",
        str(out),
        *LONG,
        *arguments,
    ]


def summaries(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def finished(folder, shelf) -> tuple[Path, str]:
    """An uninterrupted run: its folder, and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate.main(command(folder, write_files(shelf), shelf / "whole.jsonl", "--json"))
    return shelf, printed.getvalue()


@pytest.fixture
def whole(finished, tmp_path) -> tuple[str, list[dict]]:
    """What an uninterrupted run writes and prints. Its files lie in the test's folder too."""
    shelf, printed = finished
    for name in ("whole.jsonl", "whole.jsonl.config.json"):
        shutil.copy(shelf / name, tmp_path)
    return (tmp_path / "whole.jsonl").read_text(), summaries(printed)


def process(words: list, **options) -> subprocess.CompletedProcess:
    """What Python, run in the repository, makes of these arguments."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        **options,
    )


def test_kill_9_then_resume_gives_what_an_uninterrupted_run_gives(
    folder, files, tmp_path, whole, prompts, capsys
):
    """It is killed in the second file."""
    out = tmp_path / "killed.jsonl"
    done = process(["-c", KILLED, *command(folder, files, out)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    lines = out.read_text().splitlines()
    assert len(lines) == 28
    evaluate.main(command(folder, files, out, "--json", "--resume"))
    asked = sum(len(p) for _, p, _ in prompts)
    assert asked == 24 - len(lines) // 2
    assert out.read_text() == whole[0] and summaries(capsys.readouterr().out) == whole[1]


def test_a_full_disk_is_one_line_and_resume_goes_on(folder, files, tmp_path, whole, capsys):
    """The file may grow to half of what it needs."""
    out, half = tmp_path / "full.jsonl", len(whole[0]) // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

    done = process(["evaluate.py", *command(folder, files, out)], preexec_fn=limit)
    assert done.returncode == 2
    assert [
        line
        for line in re.split(r"[\r\n]+", done.stderr)
        if "sampling" not in line and line.strip()
    ] == ["evaluate.py: error: [Errno 27] File too large"]
    assert 0 < len(out.read_text()) <= half
    evaluate.main(command(folder, files, out, "--json", "--resume"))
    assert out.read_text() == whole[0] and summaries(capsys.readouterr().out) == whole[1]


def interrupt(monkeypatch, number: int) -> None:
    """Ctrl-C when so many responses are finished."""
    original, finished = Sampler.generate, []

    def interrupted(self, prompts, params, *, on_completion, **rest):
        def finish(i, sample, completion):
            on_completion(i, sample, completion)
            finished.append(i)
            if len(finished) == number:
                raise KeyboardInterrupt

        return original(self, prompts, params, on_completion=finish, **rest)

    monkeypatch.setattr(Sampler, "generate", interrupted)


def test_ctrl_c_then_resume(folder, files, tmp_path, whole, capsys, monkeypatch):
    out = tmp_path / "stopped.jsonl"
    interrupt(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command(folder, files, out, "--json"))
    monkeypatch.undo()
    (partial,) = summaries(capsys.readouterr().out)
    assert 0 < partial["n"] < 12 and len(out.read_text().splitlines()) == 2 * partial["n"]
    evaluate.main(command(folder, files, out, "--json", "--resume"))
    assert out.read_text() == whole[0] and summaries(capsys.readouterr().out) == whole[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:30] + [lines[30][:20]],  # half a record
        lambda lines: lines[:29],  # one of two runs
        lambda lines: lines[4:10] + lines[:4],  # in the order in which they were finished
        lambda lines: [],
        lambda lines: lines,  # everything is there
    ],
)
def test_resume_takes_whole_questions_only(folder, files, tmp_path, whole, prompts, damage):
    out = tmp_path / "whole.jsonl"
    kept = damage(whole[0].splitlines(keepends=True))
    out.write_text("".join(kept))
    evaluate.main(command(folder, files, out, "--resume"))
    assert out.read_text() == whole[0]
    assert (
        sum(len(asked) for _, asked, _ in prompts)
        == 24 - sum(line.endswith("\n") for line in kept) // 2
    )


def test_resume_is_refused_where_anything_differs(folder, files, tmp_path, whole):
    out, arguments = (
        tmp_path / "whole.jsonl",
        command(folder, files, tmp_path / "whole.jsonl", "--resume"),
    )
    evaluate.main([*arguments, "--max-batch", "7", "--json"])  # changes nothing
    with pytest.raises(
        InputError, match="whole.jsonl: cannot resume with other options: --limit was None; --seed"
    ) as e:
        evaluate.main([*arguments, "--seed", "1", "--limit", "5"])
    assert "\n" not in str(e.value)
    files[1].write_text(files[1].read_text().replace('"answer": "1"', '"answer": "2"'))
    with pytest.raises(InputError, match="cannot resume: .*two.jsonl changed since"):
        evaluate.main(arguments)
    with pytest.raises(InputError, match="nothing to resume"):
        evaluate.main(command(folder, files, tmp_path / "other.jsonl", "--resume"))
    with pytest.raises(InputError, match="--resume needs the --out"):
        evaluate.main(["--model", str(folder), "--resume"])
    assert out.read_text() == whole[0] and not (tmp_path / "other.jsonl").exists()


def test_resume_is_refused_with_another_model(files, tmp_path):
    folder = tiny.make_folder(tmp_path / "model", "text")
    arguments = command(folder, files, tmp_path / "out.jsonl", "--limit", "1")
    evaluate.main(arguments)
    tiny.make_folder(folder, "text_tied")
    with pytest.raises(InputError, match="cannot resume: .*model.safetensors.* changed since"):
        evaluate.main([*arguments, "--resume"])


def test_resume_is_refused_with_another_precision_or_other_bounds_on_images(files, tmp_path):
    folder = tiny.make_folder(tmp_path / "model")
    arguments = command(folder, files, tmp_path / "out.jsonl", "--limit", "1")
    evaluate.main(arguments)
    with pytest.raises(InputError, match="--dtype was 'float32'"):
        evaluate.main([*arguments, "--dtype", "bfloat16", "--resume"])
    (folder / "preprocessor_config.json").write_text('{"max_pixels": 3136, "min_pixels": 3136}')
    with pytest.raises(InputError, match="preprocessor_config.json changed since"):
        evaluate.main([*arguments, "--resume"])


def test_results_are_not_replaced_unless_told_to(folder, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, questions, "--out", str(out))
    before = out.read_text()
    with pytest.raises(
        InputError, match="out.jsonl holds results: use --resume, --overwrite, or another --out"
    ):
        run(folder, questions, "--out", str(out))
    assert out.read_text() == before
    run(folder, questions, "--out", str(out), "--limit", "1", "--overwrite")
    assert len(out.read_text().splitlines()) == 1
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    refused = {"notes.txt": "no such command has written it", "folder": "is a folder, not a file"}
    for name, reason in refused.items():
        with pytest.raises(InputError, match=reason):
            run(folder, questions, "--out", str(tmp_path / name), "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.tmp"))


def test_a_foreign_line_is_named(folder, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, questions, "--out", str(out))
    out.write_text(out.read_text().replace('"id"', '"ID"', 2).replace('"ID"', '"id"', 1))
    with pytest.raises(InputError, match="out.jsonl: line 2: not a record of this command"):
        run(folder, questions, "--out", str(out), "--resume")


# --- Files as published, and a model that knows nothing ---


@pytest.fixture(scope="module")
def guesser(tmp_path_factory) -> Path:
    """Random weights, but whole answers are single tokens: so many of its responses have one."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("guesser"), "text")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(
        [
            AddedToken(f"<answer>{answer}</answer>")
            for answer in (*"ABCD", *"(A) (B) (C) (D)".split(), "18", "72", "204", "1/2")
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


def published(path: Path, name: str, n: int) -> Path:
    """n questions in the schema of MedQA (jind11), GSM8K (openai), or of ORZ's AIME 2024."""
    path = path / f"{name}.jsonl"
    if name == "aime":
        path.write_text(
            json.dumps(
                [
                    {
                        "prompt": [{"from": "user", "value": f"How many primes are below {i}?"}],
                        "final_answer": str(1000 + i),
                    }
                    for i in range(n)
                ]
            )
        )
        return path
    records = (
        [
            {
                "question": f"Patient {i} coughs. What is it?",
                "answer": f"Disease {i % 4}",
                "options": {letter: f"Disease {j}" for j, letter in enumerate("ABCD")},
                "meta_info": f"step{i % 2 + 1}",
                "answer_idx": "ABCD"[i % 4],
                "metamap_phrases": ["cough"],
            }
            for i in range(n)
        ]
        if name == "medqa"
        else [
            {
                "question": f"{i} and {i}?",
                "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### 1,{2 * i:03}",
            }
            for i in range(n)
        ]
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "n, runs", [(400, ["--temperature", "1"]), (120, ["--runs", "5", "--temperature", "0.7"])]
)
def test_random_weights_are_at_chance_on_multiple_choice(guesser, tmp_path, capsys, n, runs):
    """What it answers has nothing to do with what is right, and what has no answer gets no guess.

    So the accuracy is what the frequencies of its letters and of the right ones make it, within
    four standard errors.
    """
    out = tmp_path / "out.jsonl"
    run(
        guesser,
        published(tmp_path, "medqa", n),
        "--prompt-style",
        "mcq",
        "--max-new-tokens",
        "24",
        "--out",
        str(out),
        "--json",
        *runs,
    )
    found, records = (
        json.loads(capsys.readouterr().out),
        [json.loads(line) for line in out.read_text().splitlines()],
    )
    assert found["n"] == n and found["dropped"] == found["bad"] == 0
    share = {letter: sum(r["vote"] == letter for r in records) / len(records) for letter in "ABCD"}
    assert sum(share.values()) > 0.2 and min(share.values()) > 0.01  # many answers, of every letter
    assert (
        abs(found["accuracy"] - sum(share.values()) / 4) < 4 * found["stderr"]
    )  # each letter is right for a quarter
    assert found["accuracy"] <= 1 - found["unparsed"] and found["unparsed"] > 0.1
    assert {r["meta"]["meta_info"] for r in records} == {"step1", "step2"}


@pytest.mark.parametrize("name", ["gsm8k", "aime"])
def test_random_weights_know_no_number(guesser, tmp_path, capsys, name):
    """Many answers, none of them right."""
    run(
        guesser,
        published(tmp_path, name, 60),
        "--prompt-style",
        "math",
        "--max-new-tokens",
        "24",
        "--temperature",
        "1",
        "--json",
    )
    found = json.loads(capsys.readouterr().out)
    assert (
        found["n"] == 60
        and found["accuracy"] == 0.0
        and found["stderr"] == 0.0
        and found["unparsed"] < 0.8
    )


def test_bad_lines_are_left_out_and_counted(folder, tmp_path, capsys):
    path = published(tmp_path, "gsm8k", 3)
    with path.open("a") as file:
        file.write(
            '{"question": "no answer?"}\nnot json\n'
            '{"question": "q", "answer": "1", "image": "none.png"}\n'
        )
    with pytest.raises(InputError, match="gsm8k.jsonl: line 4: field 'answer' is missing"):
        run(folder, path)
    run(folder, path, "--skip-bad-lines", "--json")
    captured = capsys.readouterr()
    assert (
        "gsm8k.jsonl: 3 bad records left out\n" in captured.err
        and "line 5: malformed JSON" in captured.err
    )
    assert "question gsm8k-6: " in captured.err and "none.png" in captured.err
    assert {k: v for k, v in json.loads(captured.out).items() if k in ("n", "bad", "dropped")} == {
        "n": 3,
        "bad": 3,
        "dropped": 0,
    }
    path.write_text("not json\n")
    with pytest.raises(InputError, match="line 1: malformed JSON"):
        run(folder, path, "--skip-bad-lines")


def test_every_right_answer_and_the_precision_count(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "q.jsonl"
    rest = {"question": "?", "answer": "2.3", "accepted": ["seven"], "precision": 1}
    path.write_text("".join(json.dumps({"id": i, **rest}) + "\n" for i in "abcd"))
    script(monkeypatch, [["2.31"], ["seven"], ["2.4"], ["2.3"]])
    run(folder, path, "--json")
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.75
