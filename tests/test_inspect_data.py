"""`python tools/inspect_data.py FILE` as a user starts it, its figures against counts by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tiny
from data import (
    ImageConfig,
    InputError,
    Tokenizer,
    encode_example,
    load_image,
    make_prompt,
    read_examples,
)
from hub.options import ROOT, run_command
from tools import inspect_data as inspection


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl")


def written(path: Path, *records: dict | str) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def worked(i: int, **fields) -> dict:
    return {
        "id": f"q{i}",
        "question": f"Why {i}?{' Well?' * i}",
        "answer": str(i),
        "domain": "even" if i % 2 == 0 else "odd",
        "response": f"<think>{'so ' * i}</think> <answer>{i}</answer>",
        **fields,
    }


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "inspect_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_command(tmp_path, folder):
    Image.new("RGB", (70, 60)).save(tmp_path / "a.png")
    path = written(
        tmp_path / "d.jsonl",
        worked(1),
        "{",
        worked(2, image="a.png"),
        worked(3, options={"3": "x"}),
        worked(4),
        worked(5, response=None),
        worked(6, image="gone.png"),
        worked(7, options={"A": "7", "B": "8"}),
    )
    done = run(tmp_path, path, "--model", folder, "--max-length", 120)
    assert done.returncode == 0
    title, *bad = done.stderr.splitlines()
    assert title == f"{path}: 3 bad records left out"
    places = [line.removeprefix(f"  {path}: ").split(":")[0] for line in bad]
    assert places == ["line 2", "line 4", "line 7"]
    assert "letters from A to P" in bad[1] and "gone.png" in bad[2]
    out = done.stdout
    assert "records: 5 good, 3 bad\nschema: plain 5\ndomains: odd 3, even 2\n" in out
    assert "records with: response 4, images 1, options 1\n" in out
    shown = [line.split(";")[0] for line in re.findall("^example .*", out, re.MULTILINE)]
    assert shown == ["example 1: q1", "example 2: q2", "example 3: q4"]
    assert "q2; domain even; answer '2'\n" in out
    image = "<|vision_start|><|image_pad|> x 4<|vision_end|>"
    assert (
        f"    <|im_start|>user\n    {image}Why 2? Well? Well?<|im_end|>\n"
        "    <|im_start|>assistant\n    <think>so so </think> <answer>2</answer><|im_end|>\n"
    ) in out

    tokenizer, prompts, sequences = Tokenizer.from_pretrained(folder), [], []
    for example in read_examples(path, []):
        if example.id == "q6":
            continue
        images = [load_image(image) for image in example.images]
        options = (example.options or {}).items()
        text = example.question + "".join(f"\n{letter}: {option}" for letter, option in options)
        prompts.append(len(make_prompt(text, images, tokenizer, ImageConfig()).ids))
        if example.response:
            example.images = []
            extra = 2 + 4 if images else 0  # vision start and end, 2 x 2 merged cells
            ids, _ = encode_example(example, tokenizer, style="direct", max_length=9999)
            sequences.append(extra + len(ids))
    prompts.sort()
    assert (
        f"tokens of the prompt: median {prompts[2]}, 99% up to {prompts[4]}, longest {prompts[4]}\n"
    ) in out
    sequences.sort()
    assert f"tokens of prompt and response: median {sequences[2]}, 99% up to " in out
    assert f", longest {sequences[3]}\n" in out
    cut = sum(length > 120 for length in sequences)
    assert cut > 1 and prompts[4] < 120
    assert out.endswith(
        f"at --max-length 120: 0 of 5 dropped, since the prompt fills it; {cut} cut\n"
    )


def test_what_is_dropped_and_the_limit(tmp_path, folder, capsys):
    path = written(tmp_path / "d.jsonl", *(worked(i) for i in range(20)))
    inspection.main([str(path), "--model", str(folder), "--max-length", "70", "--limit", "10"])
    out = capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(folder)
    masks = [
        encode_example(e, tokenizer, style="direct", max_length=70)[1] for e in read_examples(path)
    ][:10]
    dropped = sum(not any(mask) for mask in masks)
    assert 0 < dropped < 10 and f"at --max-length 70: {dropped} of 10 dropped" in out
    assert (
        "records: 10 good, 0 bad" in out
        and "domains: even 5, odd 5" in out
        and "example 4" not in out
    )


def test_the_prompt_style_is_applied(tmp_path, folder, capsys):
    path = written(
        tmp_path / "d.jsonl", worked(1), worked(2, options=["1", "2"], response=None, answer="2")
    )
    inspection.main([str(path), "--model", str(folder), "--prompt-style", "mcq"])
    out, err = capsys.readouterr()
    assert "tokens of prompt and response" not in out
    assert f"{path}: line 1: q1: the mcq prompt needs options" in err
    assert "Options:\n    \n    A: 1\n    B: 2<|im_end|>" in out


def test_what_was_recognised_is_shown(tmp_path, folder, capsys):
    record = {"Problem": "Which?", "choice_a": "x", "choice_b": "y", "label": ["B"], "level": 1}
    path = written(tmp_path / "d.jsonl", record | {"passage": "See."}, worked(2))
    inspection.main([str(path), "--model", str(folder)])
    out = capsys.readouterr().out
    shown = "recognised as: by names\n    options    from choice_a, choice_b\n"
    shown += (
        "    answer     from label\n    question   from Problem, passage\n    not read: level\n"
    )
    assert shown in out and "See.\n    Which?\n    A: x\n    B: y<|im_end|>" in out
    assert "answer 'B'" in out and "recognised as: plain\n" in out
    assert "schema: by names 1, plain 1" in out


def test_long_texts_are_shown_short(tmp_path, folder, capsys):
    texts = {"question": "x" * 5000, "answer": "z" * 5000, "response": None}
    path = written(tmp_path / "d.jsonl", worked(1, **texts))
    inspection.main([str(path), "--model", str(folder)])
    out = capsys.readouterr().out
    assert "characters ...]" in out and len(out) < 2000


def test_a_text_only_model_takes_no_images(tmp_path, capsys):
    folder = tiny.make_folder(tmp_path / "text", "text")
    path = written(tmp_path / "d.jsonl", worked(1), worked(2, image="a.png"))
    inspection.main([str(path), "--model", str(folder)])
    assert f"{path}: line 2: this model has no vision tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "the following arguments are required: FILE"),
        (["none.jsonl"], "none.jsonl: cannot be read (No such file"),
        (["d.jsonl", "--max-length", "1"], "--max-length must be at least 2"),
        (
            ["d.jsonl", "--prompt-style", "mcq"],
            "d.jsonl: none of the records is good; d.jsonl: line 1: q1: the mcq prompt",
        ),
        (["d.jsonl", "--model", "nowhere"], "nowhere: no such folder"),
        (["d.jsonl", "e.jsonl"], "unrecognized arguments: e.jsonl"),
    ],
)
def test_wrong_inputs(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "d.jsonl", worked(1))
    with pytest.raises(InputError) as caught:
        inspection.main(argv)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_reader_who_has_seen_enough(tmp_path):
    written(tmp_path / "d.jsonl", *(worked(i) for i in range(30)))
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'tools' / 'inspect_data.py'} d.jsonl | true",
        shell=True,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_wrong_inputs_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tools/inspect_data.py", "d.jsonl"])
    written(tmp_path / "d.jsonl", "{")
    with pytest.raises(SystemExit) as stop:
        run_command(inspection.main)
    out, error = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and error.count("\n") == 1
    assert error.startswith(
        "inspect_data.py: error: d.jsonl: none of the records is good; d.jsonl: line 1: malformed"
    )
