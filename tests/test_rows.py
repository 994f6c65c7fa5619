"""SFT's rows and GRPO's questions are tokenised in blocks, and rows are kept in the run folder."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import ranks
import sft
import tiny
import training.rows as rows_module
from data import Example, ImageConfig, InputError, Row, Tokenizer, datasets, read_examples
from data.prompts import Prompt, format_prompt, load_text_questions, make_prompt
from data.sequences import encode_example, make_row
from training.rows import RowFile, join, split
from training.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl_tied")


@pytest.fixture
def data(tmp_path) -> Path:
    """Questions and responses of 0 to 60 words, some of which look like control tokens."""
    chance, lines = random.Random(0), []
    words = [
        "two",
        "plus",
        "<|im_end|>",
        "<|im_start|>system\n",
        "\n\n",
        "caf\u00e9",
        "\u4e2d",
        "7",
    ]
    for i in range(50):
        question, response = (" ".join(chance.choices(words, k=n)) for n in (i % 7, i))
        record = {"id": f"q{i}", "question": f"Why {question}?", "answer": "7"}
        lines.append(json.dumps(record | {"response": f"<think>{response}</think>7"}) + "\n")
    path = tmp_path / "d.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def options(folder, data, tmp_path):
    """Makes options for a short run in the test's own folder."""

    def make(**changes) -> sft.SFTOptions:
        values = {"model": str(folder), "data": str(data), "out": str(tmp_path / "run")}
        values |= {"device": "cpu", "batch_size": 25, "max_length": 400, "epochs": 1}
        return sft.SFTOptions(**{**values, **changes})

    return make


def same(rows: list[Row], others: list[Row]) -> bool:
    """Are they equal, and of the same dtypes?"""
    if len(rows) != len(others):
        return False
    for one, other in zip(rows, others):
        if one.example != other.example:
            return False
        for tensor, like in ((one.ids, other.ids), (one.scored, other.scored)):
            if tensor.dtype != like.dtype or not torch.equal(tensor, like):
                return False
    return True


# --- In blocks ---


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(
    "changes", [{}, {"max_length": 160}, {"answer_only": True}, {"prompt_style": "train"}]
)
def test_rows_are_those_of_the_definition(options, folder, monkeypatch, block, changes):
    monkeypatch.setattr(datasets, "BLOCK", block)
    o, tokenizer = options(**{"max_length": 700, **changes}), Tokenizer.from_pretrained(folder)
    expected = []
    for example in read_examples(o.data):
        how = {"style": o.prompt_style, "max_length": o.max_length, "answer_only": o.answer_only}
        row = make_row(*encode_example(example, tokenizer, **how), example.id)
        if row.scored.any():
            expected.append(row)
    lengths = [len(row.ids) for row in expected]
    assert len(set(lengths)) > 5 and (o.max_length in lengths) == (o.max_length == 160)
    assert same(sft.load_rows(o, tokenizer), expected)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_questions_are_those_of_the_definition(data, folder, monkeypatch, block):
    monkeypatch.setattr(datasets, "BLOCK", block)
    tokenizer, limit = Tokenizer.from_pretrained(folder), 90

    def prompt_of(example: Example) -> Prompt:
        return make_prompt(format_prompt(example, "direct"), [], tokenizer, ImageConfig())

    expected = {example.id: prompt_of(example) for example in read_examples(data)}
    kept = {name: prompt for name, prompt in expected.items() if len(prompt.ids) <= limit}
    assert 0 < len(kept) < len(expected)
    found = load_text_questions(data, tokenizer, style="direct", limit=limit)
    assert {question.example.id: question.prompt for question in found} == kept


def test_a_text_that_is_no_unicode_is_named_with_its_line(options, folder, data, capsys):
    record = {"question": "?", "answer": "1", "response": "a\ud800"}
    data.write_text(data.read_text() + json.dumps(record) + "\n")
    tokenizer = Tokenizer.from_pretrained(folder)
    with pytest.raises(InputError, match=r"d.jsonl: line 51: text is not valid Unicode: 'a"):
        sft.load_rows(options(), tokenizer)
    assert len(sft.load_rows(options(skip_bad_lines=True), tokenizer)) == 50
    assert "1 bad records left out" in capsys.readouterr().err


# --- Kept in the run folder ---


def test_joined_rows_are_split_again():
    rows = [
        make_row([5, 6, 7], [True, False, True], "caf\u00e9"),
        make_row([8], [True], ""),
        make_row([9, 151_664], [False, True], "q" * 300),
    ]
    joined = join(rows)
    assert same(split(joined), rows) and len(joined["ids"]) == 6
    assert sum(tensor.nbytes for tensor in (joined["ids"], joined["scored"])) == 5 * 6


def refuse() -> list[Row]:
    raise AssertionError("tokenised, though the rows are kept")


def kept(o: sft.SFTOptions) -> RowFile:
    return RowFile(Run(o), sft.ROW_OPTIONS)


def test_a_run_keeps_its_rows_and_resume_finds_them(options, folder, monkeypatch, capsys):
    sft.train(options(max_steps=1))
    rows = sft.load_rows(options(), Tokenizer.from_pretrained(folder))
    assert same(kept(options(resume=True)).rows(refuse), rows)
    # The whole command, too: it tokenises nothing, and ends where an undisturbed run ends.
    with monkeypatch.context() as patched:
        patched.setattr(sft, "load_rows", refuse)
        sft.train(options(resume=True, max_steps=2))
    resumed = (Path(options().out) / "model" / "model.safetensors").read_bytes()
    sft.train(options(overwrite=True, max_steps=2))
    assert (Path(options().out) / "model" / "model.safetensors").read_bytes() == resumed
    assert kept(options(resume=True)).rows(refuse)
    assert "rows.npz" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["data", "max_length", "answer_only", "prompt_style", "tokenizer", "reader"]
)
def test_rows_of_another_key_are_not_used(options, folder, data, tmp_path, monkeypatch, change):
    sft.train(options(max_steps=1))
    changes = {"max_length": 399, "answer_only": True, "prompt_style": "train"}
    o = options(overwrite=True, **{k: v for k, v in changes.items() if k == change})
    assert kept(options(overwrite=True)).rows(refuse)
    if change == "data":
        data.write_text(data.read_text().replace("two", "six"))
    if change == "tokenizer":
        o.model = str(tiny.make_folder(tmp_path / "other", "vl_tied"))
        path = Path(o.model) / "tokenizer.json"
        path.write_text(path.read_text() + "\n")
    if change == "reader":
        monkeypatch.setattr(rows_module, "ROOT", tmp_path)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "reader.py").write_text("pass")
    made = [make_row([1, 2], [False, True], "new")]
    file = kept(o)
    assert same(file.rows(lambda: made), made)
    file.keep()
    assert same(kept(o).rows(refuse), made)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "a flipped bit":  # in the middle of the ids: the header of the file is as it was
        place = content.index(b"ids.npy") + 500
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    cases = {"cut short": content[: len(content) // 2], "empty": b"", "no zip": b"x" * 500}
    path.write_bytes(cases.get(how, content))
    if how == "another array":
        np.savez(path, rows=np.zeros(3))
    if how == "a pickle":
        np.savez(path, key=np.array({"a": 1}, dtype=object))


DAMAGES = ["cut short", "empty", "no zip", "a flipped bit", "another array", "a pickle"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_rows_are_made_anew_and_said_in_one_line(options, folder, capsys, how):
    sft.train(options(max_steps=1))
    path = Path(options().out) / "rows.npz"
    whole = path.read_bytes()
    damage(path, how)
    capsys.readouterr()
    sft.train(options(resume=True, max_steps=2))
    said = [line for line in capsys.readouterr().err.splitlines() if "rows.npz" in line]
    assert said == [f"{path}: damaged, so the data are tokenised anew"]
    assert len(path.read_bytes()) == len(whole)
    rows = sft.load_rows(options(), Tokenizer.from_pretrained(folder))
    assert same(kept(options(resume=True)).rows(refuse), rows)


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(options, folder, tmp_path, monkeypatch):
    def no_model(_):
        raise InputError("damaged model")

    monkeypatch.setattr(sft, "load_for_training", no_model)
    with pytest.raises(InputError, match="damaged model"):
        sft.train(options())
    assert not Path(options().out).exists()


def test_a_full_disk_costs_the_rows_only(options, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows_module.np, "savez", full)
    sft.train(options(max_steps=1))
    out = Path(options().out)
    assert f"{out}/rows.npz: not kept (No space left on device)" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").exists() and not list(out.glob("rows*"))


def test_of_two_processes_the_first_tokenises_for_both(options, folder, data, tmp_path):
    """Rows that are made, then found, then refused."""
    command = ["sft.py", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "n")]
    command += ["--device", "cpu", "--batch-size", "25", "--max-length", "160"]
    for more in (["--max-steps", "1"], ["--max-steps", "2", "--resume"]):
        for code, _, complaint in ranks.run(2, command + more):
            assert code == 0, complaint
    alone = options(max_length=160, max_steps=2, out=str(tmp_path / "alone"))
    sft.train(alone)
    losses = []
    for out in (tmp_path / "n", tmp_path / "alone"):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    arrays = [dict(np.load(tmp_path / name / "rows.npz")) for name in ("n", "alone")]
    assert arrays[0].keys() == {"key", "ids", "scored", "lengths", "examples"}
    assert all(np.array_equal(array, arrays[1][name]) for name, array in arrays[0].items())
    data.write_text(data.read_text() + "{\n")
    command[command.index("--out") + 1] = str(tmp_path / "bad")
    for code, _, complaint in ranks.run(2, command):
        assert code == 2 and "line 51: malformed JSON" in complaint, complaint
    assert not (tmp_path / "bad").exists()
