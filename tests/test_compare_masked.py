"""Table 6: which questions are text-solvable, and two models on the others."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import tiny
from data import InputError
from sample import Sampler
from tools import compare_masked
from training.record_file import short_names


def masked_file(
    path: Path,
    questions: dict[str, list[bool]],
    *,
    masked: bool = True,
    file: str = "pictures.jsonl",
) -> str:
    """An --out file as evaluate.py writes it, of the fields that are read."""
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
    compare_masked.main([a, b, "--on", *on, "--out", str(ids), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["runs"], found["solved"]) == (5, [3, 3], [2, 2])
    assert (found["solved_by_either"], found["remaining"]) == (3, 2)
    assert sorted(q["id"] for q in found["text_solvable"]) == ["q1", "q2", "q3"]
    assert [[part["accuracy"] for part in found[name]] for name in ("all", "rest")] == [
        pytest.approx([0.6, 0.8, 0.2]),
        pytest.approx([0.0, 0.5, 0.5]),
    ]
    assert [part["n"] for part in found["rest"]] == [2, 2, 2]
    # of the paired differences 0, 0, 0, 1, 0
    assert found["all"][2]["stderr"] == pytest.approx((0.2 * 0.8 / 4) ** 0.5)
    assert [json.loads(line) for line in ids.read_text().splitlines()] == [
        {"file": "pictures.jsonl", "id": i} for i in ("q4", "q5")
    ]
    compare_masked.main([a, b])  # works by itself
    printed = capsys.readouterr().out
    # A is right in 3 + 2 + 3 + 2 + 2 of 15 answers, question by question 1, 2/3, 1, 2/3, 2/3:
    # deviations 0.2, -0.4/3
    assert all(re.search(rf"/{name} +80.0 \+- 8.2 +2 \(3 of 3\)", printed) for name in "ab")
    assert "always right by one of the two, or both: 3; that leaves 2" in printed
    assert "with their images" not in printed
    compare_masked.main([a, b, "--on", *on])
    assert re.search(r"difference +20.0 \+- 20.0 +50.0 \+- 50.0", capsys.readouterr().out)
    with pytest.raises(InputError, match="rest.jsonl is there"):
        compare_masked.main([a, b, "--out", str(ids)])


def test_other_files_are_refused(tmp_path):
    three = {"q1": [True] * 3, "q2": [False] * 3}
    good = masked_file(tmp_path / "good", three)
    once = masked_file(tmp_path / "once", {"q1": [True], "q2": [True]})
    some = masked_file(tmp_path / "some", {"q1": [True] * 3, "q2": [False] * 2})
    less = masked_file(tmp_path / "less", {"q1": [True] * 3})
    shown = masked_file(tmp_path / "shown", three, masked=False)
    other = masked_file(tmp_path / "other", three, file="else.jsonl")
    (tmp_path / "noise").write_text('{"id": 3}\n')
    runs = "every image question must have the same number of runs, at least 2: make it with"
    for arguments, message in (
        ([good], "SECOND"),
        ([good, good, good], "unrecognized arguments"),
        ([good, good, "--on", good], "--on takes two"),
        ([good, once], f"once: {runs}"),
        ([good, some], f"some: {runs} .*, or finish it with --resume"),
        ([shown, good], f"shown: {runs} --mask-images"),
        ([good, less], "less: question q2 of pictures.jsonl is missing"),
        ([less, good], "less: question q2 of pictures.jsonl is missing"),
        ([good, other], "good: question q1 of else.jsonl is missing"),
        ([good, str(tmp_path / "noise")], "noise: line 1: not a record of evaluate.py --out"),
        ([good, good, "--on", good, shown], "good: question q1 of pictures.jsonl is missing"),
    ):
        with pytest.raises(InputError, match=message):
            compare_masked.main(arguments)


def several_files(path: Path, answers: dict[str, str | None], *, correct: str) -> str:
    """An --out file with one question, test-1, of each file; `answers` are the right ones."""
    records = [
        {"file": file, "id": "test-1", "masked": True, "correct": file == correct, "vote": None}
        | ({} if answer is None else {"answer": answer})
        for file, answer in answers.items()
        for _ in range(2)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_files_of_one_name_are_two_files(tmp_path, capsys):
    """Default ids begin with the file's name, so theirs are the same, too."""
    files = {"x/a/test.jsonl": None, "x/b/test.jsonl": None, "x/c.jsonl": None}
    one = several_files(tmp_path / "one", files, correct="x/a/test.jsonl")
    elsewhere = {name.replace("x/", "/data/"): None for name in files}
    two = several_files(tmp_path / "two", elsewhere, correct="/data/c.jsonl")
    compare_masked.main([one, two, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["remaining"]) == (3, 1)
    assert [q["file"] for q in found["text_solvable"]] == ["a/test.jsonl", "c.jsonl"]
    # One model has only one of the two: which one is not to be guessed.
    some = several_files(tmp_path / "some", {"x/a/test.jsonl": None}, correct="")
    with pytest.raises(InputError, match="question test-1 of test.jsonl is missing"):
        compare_masked.main([one, some])


def test_other_questions_under_one_name_are_refused(tmp_path):
    one = several_files(tmp_path / "one", {"a/test.jsonl": "1"}, correct="")
    two = several_files(tmp_path / "two", {"b/test.jsonl": "2"}, correct="")
    message = "two: question test-1 of test.jsonl has another answer than in .*one"
    with pytest.raises(InputError, match=message):
        compare_masked.main([one, two])


def test_short_names():
    assert short_names(["a/x.jsonl", "b/y.jsonl"]) == {
        "a/x.jsonl": "x.jsonl",
        "b/y.jsonl": "y.jsonl",
    }
    same = ["a/b/x.jsonl", "c/b/x.jsonl", "x.jsonl", "c/d.jsonl"]
    names = ["a/b/x.jsonl", "c/b/x.jsonl", "x.jsonl", "d.jsonl"]
    assert list(short_names(same).values()) == names
    assert set(short_names(["./x.jsonl", "x.jsonl"]).values()) == {"x.jsonl"}


def test_from_the_answers_of_evaluate(tmp_path, monkeypatch, capsys):
    """The image question is solved without its image by one model; nothing is left to compare."""
    folder = tiny.make_folder(tmp_path / "model", "vl")
    Image.new("RGB", (56, 56), (200, 30, 90)).save(tmp_path / "dot.png")
    questions = tmp_path / "questions.jsonl"
    records = [
        {"id": "a", "question": "One and one?", "answer": "2"},
        {"id": "b", "question": "Which colour?", "answer": "red", "image": "dot.png"},
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--model", str(folder), "--data", str(questions), "--max-new-tokens", "4"]
    command += ["--device", "cpu"]
    generate = Sampler.generate

    def run(name: str, answer: str, *arguments: str) -> None:
        """Has a model answer every question so."""

        def scripted(self, prompts, params, *, on_completion, **rest):
            def finish(i, sample, completion):
                completion.text = f"<think>I think</think><answer>{answer}</answer>"
                on_completion(i, sample, completion)

            return generate(self, prompts, params, on_completion=finish, **rest)

        monkeypatch.setattr(Sampler, "generate", scripted)
        evaluate.main([*command, "--out", str(tmp_path / name), *arguments])

    masked = ["--mask-images", "--runs", "3", "--temperature", "1"]
    run("a", "red", *masked)
    run("b", "blue", *masked)
    run("c", "red")
    run("d", "red")
    capsys.readouterr()
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    compare_masked.main([a, b])  # both also have text questions: nothing is masked there
    printed = capsys.readouterr().out
    assert "1 image questions" in printed and "that leaves 0" in printed
    compare_masked.main([a, b, "--on", c, d, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["solved"], found["remaining"], found["rest"]) == (1, [1, 0], 0, [])
    assert found["text_solvable"] == [{"file": "questions.jsonl", "id": "b"}]
    compare_masked.main([a, b, "--on", c, d])
