"""Evaluation: figures of hand-made records, what is asked of the model, and whole runs of the command."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import tiny  # noqa: E402
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
    assert (found["n"], found["accuracy"], found["unparsed"], found["forced"]) == (4, 0.75, 0.25, 1.0)
    assert found["stderr"] == pytest.approx(0.25) and found["mean_words"] == 10.0 and found["mean_tokens"] == 20.0
    assert found["by_domain"] == {"maths": {"n": 3, "accuracy": 1.0}, "medicine": {"n": 1, "accuracy": 0.0}}
    assert not any("@" in key for key in found)


def test_figures_of_several_runs_by_hand():
    found = summarise(
        records(
            ([("2", True), ("2.0", True), ("3", False)], None),  # mean 2/3, majority right, passed
            ([("5", False), ("5", False), ("4", True)], None),  # mean 1/3, majority wrong, passed
            ([(None, False), (None, False), ("7", True)], None),  # mean 1/3, the one vote is right, passed
            ([("8", False), (None, False), ("9", False)], None),
        )
    )  # 0
    assert found["n"] == 4 and found["accuracy"] == found["avg@3"] == pytest.approx(1 / 3)
    assert found["maj@3"] == 0.5 and found["pass@3"] == 0.75 and found["unparsed"] == pytest.approx(3 / 12)
    # over questions, not over answers: 2/3, 1/3, 1/3, 0 deviate by 1/3, 0, 0, -1/3; variance 2/27, over 4 questions
    assert found["stderr"] == pytest.approx((2 / 27 / 4) ** 0.5)
    assert found["mean_words"] == 20.0 and found["forced"] == pytest.approx(1 / 3)
    assert found["by_domain"] == {"None": {"n": 4, "accuracy": pytest.approx(1 / 3)}}


def test_one_question_has_no_spread():
    found = summarise(records(([("1", True)], None)))
    assert found["accuracy"] == 1.0 and found["stderr"] == 0.0


@pytest.mark.parametrize(
    "answers, right",
    [
        ([("1/2", True), ("0.5", True), ("3", False), ("4", False)], True),  # equivalent answers vote together
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
    assert vote("<answer>B: No</answer>", Example("q", "?", "4")) == "B: No" and vote("no tags", example) is None


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
                {"id": "a", "question": "One and one?", "answer": "2", "domain": "maths", "depth": 1},
                {
                    "id": "b",
                    "question": "Which colour?",
                    "answer": "A",
                    "options": {"A": "red", "B": "blue"},
                    "image": "dot.png",
                    "domain": "art",
                },
                {"id": "c", "question": "Two and two?", "answer": "4", "domain": "maths", "depth": 2},
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


def run(folder: Path, questions: Path, *arguments: str) -> None:
    evaluate.main(
        ["--model", str(folder), "--data", str(questions), "--max-new-tokens", "4", "--device", "cpu", *arguments]
    )


def test_json_and_records(folder, questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(folder, questions, "--json", "--out", str(out))
    (line,) = capsys.readouterr().out.splitlines()
    summary = json.loads(line)
    assert {"n", "accuracy", "stderr", "unparsed", "mean_words", "forced", "by_domain"} <= summary.keys()
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
            [(r["id"], r["run"], r["response"]) for r in map(json.loads, (tmp_path / name).read_text().splitlines())]
        )
    assert texts[0] == texts[1] and texts[2] == texts[3] != texts[4]
    assert [(i, r) for i, r, _ in texts[2]] == [(i, r) for i in "abc" for r in range(3)]
    assert len({text for i, _, text in texts[2] if i == "a"}) > 1
    keys = json.loads(capsys.readouterr().out.splitlines()[2]).keys()
    assert {"avg@3", "maj@3", "pass@3"} <= keys


def test_right_answers_are_counted(folder, questions, monkeypatch, capsys):
    """The model's part is played by a script: two answers of three are right, one with an option's text."""
    original = Sampler.generate

    def scripted(self, prompts, params, **rest):
        groups = original(self, prompts, params, **rest)
        for group, answer in zip(groups, ("2.0", "A: red", "5")):
            group[0].text = f"<think>I think</think><answer>{answer}</answer>"
        return groups

    monkeypatch.setattr(Sampler, "generate", scripted)
    run(folder, questions, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["accuracy"] == pytest.approx(2 / 3)
        and summary["unparsed"] == 0.0
        and summary["stderr"] == pytest.approx(1 / 3)
    )
    assert summary["by_domain"] == {"art": {"n": 1, "accuracy": 1.0}, "maths": {"n": 2, "accuracy": 0.5}}


def test_images_reach_the_model_unless_masked(folder, questions, prompts):
    run(folder, questions)
    run(folder, questions, "--mask-images")
    (tokenizer, shown, _), (_, masked, _) = prompts
    assert [p.patches is not None for p in shown] == [False, True, False] and shown[1].grids == [(1, 4, 4)]
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
    assert len(asked) == 1 and (params.n, params.temperature, params.seed, params.think_budget) == (2, 0.3, 9, 2)
    assert "You will solve a problem/request." in tokenizer.decode(asked[0].ids)
    assert (params.max_new_tokens, params.top_p, params.top_k) == (4, 1.0, 0)


def test_forced_exits_are_counted(folder, questions, tmp_path, capsys):
    run(folder, questions, "--json", "--think-budget", "1", "--max-new-tokens", "20", "--out", str(tmp_path / "out"))
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
    head, first, second = capsys.readouterr().out.splitlines()
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
    ]
    assert first.split()[:5] == ["questions", "3", "0.0", "+-", "0.0"] and second.split()[:2] == ["other", "2"]


def test_batch_size_changes_nothing(folder, questions, tmp_path):
    for size in ("1", "256"):
        run(folder, questions, "--max-batch", size, "--runs", "2", "--temperature", "1", "--out", str(tmp_path / size))
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
        (['{"id": "a", "question": "q", "answer": "1"}'], ("--prompt-style", "mcq"), "needs options"),
        (['{"id": "a", "question": "q", "answer": "1", "image": "none.png"}'], (), "none.png"),
    ],
)
def test_bad_questions_are_refused_before_anything_is_sampled(folder, tmp_path, prompts, lines, arguments, message):
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
