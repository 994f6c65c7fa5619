"""Evaluation: figures of hand-made records, what is asked of the model, and whole runs of the command."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tiny  # noqa: E402

import evaluate  # noqa: E402
from data import Example, InputError  # noqa: E402
from evaluate import majority, summarise, vote  # noqa: E402
from sample import Sampler  # noqa: E402


def records(*questions: tuple[list[tuple[str | None, bool]], str | None]) -> list[dict]:
    """Each question: the answers of its runs with their verdicts, and its domain."""
    return [
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
        for i, (answers, domain) in enumerate(questions)
        for run, (answer, correct) in enumerate(answers)
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
    # over questions, not over answers: 2/3, 1/3, 1/3, 0 deviate by 1/3, 0, 0, -1/3; variance 2/27, over 4 questions
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
    assert majority(records((answers, None))) is right


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
    """The model's part is played by a script: two answers of three are right, one with an option's text."""
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
    assert [p.patches is not None for p in shown] == [False, True, False] and shown[1].grids == [
        (1, 4, 4)
    ]
    assert shown[1].ids.count(tokenizer.image_pad) == 4
    assert all(p.patches is None and not p.grids for p in masked)
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
            "--runs above 1 needs a --temperature above 0",
        ),
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


def test_limit_stops_before_bad_lines(folder, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "1"}\nnot json\n')
    assert [e.id for e in evaluate.load_examples(str(path), 1)] == ["a"]
    with pytest.raises(InputError, match="line 2"):
        evaluate.load_examples(str(path), None)


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


# --- What does not fit, and what does not fit at a time ---


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
        "q.jsonl: 1 of 3 questions dropped: they do not fit the context of 512 tokens\n"
        in captured.err
    )
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["0", "2"]
    assert len(prompts[0][1]) == 2
    run(folder, path, "--limit", "1", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["dropped"] == 0 and "dropped" not in captured.err


def test_images_wait_in_portions(folder, questions, tmp_path, prompts, monkeypatch):
    """Another portion gives the same records, and no more images at a time."""
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    more = [{**r, "id": f"{r['id']}{i}"} for i in range(3) for r in records]
    questions.write_text("".join(json.dumps(r) + "\n" for r in more))
    for name, size in (("whole", evaluate.IMAGE_BYTES), ("parts", 1)):
        monkeypatch.setattr(evaluate, "IMAGE_BYTES", size)
        run(folder, questions, "--runs", "2", "--temperature", "1", "--out", str(tmp_path / name))
    assert [len(asked) for _, asked, _ in prompts] == [9, 2, 3, 3, 1]
    assert (tmp_path / "whole").read_text() == (tmp_path / "parts").read_text()


# --- Interruptions ---

LONG = [
    "--runs",
    "2",
    "--temperature",
    "1",
    "--max-new-tokens",
    "40",
    "--max-batch",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two files of questions, some of them equal but for their id."""
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        lines = [{"id": f"q{i}", "question": f"What is {i % 5}?", "answer": "1"} for i in range(12)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


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


@pytest.fixture
def whole(folder, files, tmp_path, capsys) -> tuple[str, list[dict]]:
    """What an uninterrupted run writes and prints."""
    out = tmp_path / "whole.jsonl"
    evaluate.main(command(folder, files, out, "--json"))
    return out.read_text(), summaries(capsys.readouterr().out)


def start(arguments: list[str], **options) -> subprocess.Popen:
    """The command as a process."""
    return subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        **options,
    )


def test_kill_9_then_resume_gives_what_an_uninterrupted_run_gives(
    folder, files, tmp_path, whole, prompts, capsys
):
    out, asked = tmp_path / "killed.jsonl", []
    process = start(command(folder, files, out))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not out.exists() or out.read_bytes().count(b"\n") < 28
    ):  # in file 2
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = out.read_text().splitlines()
    assert 28 <= len(lines) < 48, "killed too late"
    evaluate.main(command(folder, files, out, "--json", "--resume"))
    asked = sum(len(p) for _, p, _ in prompts[2:])  # behind those of `whole`
    assert asked <= 24 - len(lines) // 2
    assert out.read_text() == whole[0] and summaries(capsys.readouterr().out) == whole[1]


def test_a_full_disk_is_one_line_and_resume_goes_on(folder, files, tmp_path, whole, capsys):
    """The file may grow to half of what it needs."""
    out, half = tmp_path / "full.jsonl", len(whole[0]) // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

    process = start(command(folder, files, out), preexec_fn=limit)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert [
        line for line in re.split(r"[\r\n]+", error) if "sampling" not in line and line.strip()
    ] == ["evaluate.py: error: [Errno 27] File too large"]
    assert 0 < len(out.read_text()) <= half
    evaluate.main(command(folder, files, out, "--json", "--resume"))
    assert out.read_text() == whole[0] and summaries(capsys.readouterr().out) == whole[1]


def test_ctrl_c_then_resume(folder, files, tmp_path, whole, capsys, monkeypatch):
    out, forward, steps = tmp_path / "stopped.jsonl", Sampler.forward, []

    def interrupted(self, B):
        steps.append(B)
        if len(steps) == 200:
            raise KeyboardInterrupt
        forward(self, B)

    monkeypatch.setattr(Sampler, "forward", interrupted)
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
    del prompts[:]
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
    with pytest.raises(InputError, match="cannot resume: .*model.safetensors changed since"):
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
    for name, content in (("notes.txt", "mine"), ("folder", None)):
        (tmp_path / name).write_text(content) if content else (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="no such command has written it"):
            run(folder, questions, "--out", str(tmp_path / name), "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.tmp"))


def test_a_foreign_line_is_named(folder, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, questions, "--out", str(out))
    out.write_text(out.read_text().replace('"id"', '"ID"', 2).replace('"ID"', '"id"', 1))
    with pytest.raises(InputError, match="out.jsonl: line 2: not a record of this command"):
        run(folder, questions, "--out", str(out), "--resume")


# --- Without images ---


def masked_file(
    path: Path,
    questions: dict[str, list[bool]],
    *,
    masked: bool = True,
    file: str = "pictures.jsonl",
) -> str:
    """An --out file as evaluate.py writes it, of the fields that the ablation reads."""
    records = [
        {"file": f"some/where/{file}", "id": i, "masked": masked, "correct": correct, "vote": None}
        for i, runs in questions.items()
        for correct in runs
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_text_solvable_by_hand(tmp_path, capsys):
    """q1 is solved every time by A, q2 by B, q3 by both; q4 and q5 remain."""
    yes, no = [True] * 3, [True, True, False]
    a = masked_file(tmp_path / "a", {"q1": yes, "q2": no, "q3": yes, "q4": no, "q5": no})
    b = masked_file(tmp_path / "b", {"q5": no, "q1": no, "q2": yes, "q3": yes, "q4": no})
    right = {"q1": [True], "q2": [True], "q3": [True], "q4": [True], "q5": [False]}
    on = [
        masked_file(tmp_path / "c", {**right, "q4": [False]}, masked=False),
        masked_file(tmp_path / "d", right, masked=False),
    ]
    ids = tmp_path / "rest.jsonl"
    evaluate.main(["--text-solvable", a, b, "--on", *on, "--out", str(ids), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["runs"], found["solved"]) == (5, [3, 3], [2, 2])
    assert (found["solved_by_either"], found["remaining"]) == (3, 2)
    assert sorted(q["id"] for q in found["text_solvable"]) == ["q1", "q2", "q3"]
    assert [[part["accuracy"] for part in found[name]] for name in ("all", "rest")] == [
        pytest.approx([0.6, 0.8, 0.2]),
        pytest.approx([0.0, 0.5, 0.5]),
    ]
    assert [part["n"] for part in found["rest"]] == [2, 2, 2]
    assert found["all"][2]["stderr"] == pytest.approx(
        (0.2 * 0.8 / 4) ** 0.5
    )  # of the paired differences 0, 0, 0, 1, 0
    assert [json.loads(line) for line in ids.read_text().splitlines()] == [
        {"file": "pictures.jsonl", "id": i} for i in ("q4", "q5")
    ]
    evaluate.main(["--text-solvable", a, b])  # works by itself
    printed = capsys.readouterr().out
    # A is right in 3 + 2 + 3 + 2 + 2 of 15 answers, question by question 1, 2/3, 1, 2/3, 2/3: deviations 0.2, -0.4/3
    assert all(re.search(rf"/{name} +80.0 \+- 8.2 +2 \(3 of 3\)", printed) for name in "ab")
    assert (
        "always right by one of the two, or both: 3; that leaves 2" in printed
        and "with their images" not in printed
    )
    evaluate.main(["--text-solvable", a, b, "--on", *on])
    assert re.search(r"difference +20.0 \+- 20.0 +50.0 \+- 50.0", capsys.readouterr().out)
    # one file per model, with the answers to the masked and to the shown images
    for one, other in zip((a, b), on):
        with Path(one).open("a") as file:
            file.write(Path(other).read_text())
    evaluate.main(["--text-solvable", a, b])
    assert re.search(r"difference +20.0 \+- 20.0 +50.0 \+- 50.0", capsys.readouterr().out)
    with pytest.raises(InputError, match="rest.jsonl is there"):
        evaluate.main(["--text-solvable", a, b, "--out", str(ids)])


def test_text_solvable_refuses_other_files(tmp_path):
    three = {"q1": [True] * 3, "q2": [False] * 3}
    good = masked_file(tmp_path / "good", three)
    once = masked_file(tmp_path / "once", {"q1": [True], "q2": [True]})
    some = masked_file(tmp_path / "some", {"q1": [True] * 3, "q2": [False] * 2})
    less = masked_file(tmp_path / "less", {"q1": [True] * 3})
    shown = masked_file(tmp_path / "shown", three, masked=False)
    other = masked_file(tmp_path / "other", three, file="else.jsonl")
    (tmp_path / "noise").write_text('{"id": 3}\n')
    for arguments, message in (
        ([good], "takes two files"),
        ([good, good, good], "takes two files"),
        ([good, good, "--on", good], "takes two files"),
        ([good, once], "once: each question was asked once: make it with --runs 3"),
        ([good, some], "some: not every question has 3 runs: finish it with --resume"),
        (
            [good, less],
            "good and .*less are not of the same questions: only one has q2 of pictures.jsonl",
        ),
        ([good, other], "not of the same questions"),
        (
            [shown, good],
            "shown: no question was asked with its image masked: make it with --mask-images",
        ),
        ([good, str(tmp_path / "noise")], "noise: line 1: not a record of evaluate.py --out"),
        (
            [good, good, "--on", good, shown],
            "good: q1 of pictures.jsonl was not asked with its image",
        ),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main(["--text-solvable", *arguments])
    with pytest.raises(InputError, match="--on goes with --text-solvable"):
        evaluate.main(["--on", good, good])


def test_text_solvable_end_to_end(folder, questions, tmp_path, monkeypatch, capsys):
    """The image question is solved without its image by one model; so nothing is left to compare."""
    out = {name: str(tmp_path / name) for name in ("a", "b", "c", "d")}
    for name, answer in (("a", "A"), ("b", "B")):
        with monkeypatch.context() as patch:
            script(patch, [["0"] * 3, [answer] * 3, ["0"] * 3])
            run(
                folder,
                questions,
                "--mask-images",
                "--runs",
                "3",
                "--temperature",
                "1",
                "--out",
                out[name],
            )
    for name in ("c", "d"):
        run(folder, questions, "--out", out[name])
    capsys.readouterr()
    evaluate.main(
        ["--text-solvable", out["a"], out["b"]]
    )  # both also have text questions: nothing is masked there
    assert (
        "1 image questions" in (printed := capsys.readouterr().out) and "that leaves 0" in printed
    )
    evaluate.main(["--text-solvable", out["a"], out["b"], "--on", out["c"], out["d"], "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["solved"], found["remaining"], found["rest"]) == (1, [1, 0], 0, [])
    assert found["text_solvable"] == [{"file": "questions.jsonl", "id": "b"}]
    evaluate.main(["--text-solvable", out["a"], out["b"], "--on", out["c"], out["d"]])


# --- Files as published, and a model that knows nothing ---


@pytest.fixture(scope="module")
def guesser(tmp_path_factory) -> Path:
    """Random weights, but a vocabulary in which whole answers are single tokens: so many of its responses have one."""
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


@pytest.mark.parametrize("runs", [["--temperature", "1"], ["--runs", "5", "--temperature", "0.7"]])
def test_random_weights_are_at_chance_on_multiple_choice(guesser, tmp_path, capsys, runs):
    """What it answers has nothing to do with what is right, and an answer that cannot be parsed gets no random guess:
    the accuracy is what the frequencies of its letters and of the right ones make it, within four standard errors."""
    n, out = 400, tmp_path / "out.jsonl"
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
            '{"question": "no answer?"}\nnot json\n{"question": "q", "answer": "1", "image": "none.png"}\n'
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
