"""`python tools/inspect_data.py FILE`, as a user starts it, and its figures against counts by hand."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tools import inspect_data as inspection  # noqa: E402
import tiny  # noqa: E402
from data import ImageConfig, Tokenizer, encode_example, load_image, make_prompt, read_examples  # noqa: E402
from data.datasets import InputError  # noqa: E402


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
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "inspect_data.py",
            path,
            "--model",
            folder,
            "--max-length",
            "120",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert "schema: plain 5\n" in out
    assert "records: 5 good, 3 bad; with images 1, with options 1, with a response 4\n" in out
    assert "domains: odd 3, even 2\n" in out
    bad = re.findall("^bad: (.*)", out, re.MULTILINE)
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in bad] == [
        "line 2",
        "line 4",
        "line 7",
    ]
    assert "gone.png" in bad[2] and "letters from A to P" in bad[1]
    assert [line.split(";")[0] for line in re.findall("^example .*", out, re.MULTILINE)] == [
        "example 1: q1",
        "example 2: q2",
        "example 3: q4",
    ]
    assert "q2; answer '2'; domain even; 1 images\n" in out
    assert (
        "    <|im_start|>user\n    <|vision_start|><|image_pad|> x 4<|vision_end|>Why 2? Well? Well?<|im_end|>\n"
        "    <|im_start|>assistant\n    <think>so so </think> <answer>2</answer><|im_end|>\n"
    ) in out
    tokenizer, prompts, sequences = Tokenizer.from_pretrained(folder), [], []
    for example in read_examples(path, []):
        if example.id != "q6":
            images = [load_image(image) for image in example.images]
            text = example.question + "".join(
                f"\n{k}: {v}" for k, v in (example.options or {}).items()
            )
            prompts.append(len(make_prompt(text, images, tokenizer, ImageConfig()).ids))
            if example.response:
                example.images = []
                extra = 2 + 4 if images else 0  # vision start and end, 2 x 2 merged cells
                sequences.append(
                    extra
                    + len(encode_example(example, tokenizer, style="direct", max_length=9999)[0])
                )
    assert re.search(
        rf"tokens of the prompt \(direct\): least {min(prompts)}, median {sorted(prompts)[2]}, mean .*, "
        rf"99% up to {max(prompts)}, most {max(prompts)}\n",
        out,
    )
    assert re.search(
        rf"tokens of prompt and response: least {min(sequences)}, .* most {max(sequences)}\n", out
    )
    over = [n - 120 for n in sequences if n > 120]
    assert len(over) > 1 and max(prompts) < 120
    assert out.endswith(
        f"at --max-length 120: 0 of 5 dropped, since the prompt fills it; {len(over)} cut, "
        f"by {sum(over)} tokens in all\n"
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


def test_the_prompt_style_is_shown_and_applied(tmp_path, folder, capsys):
    path = written(
        tmp_path / "d.jsonl",
        worked(1),
        worked(2, options=["1", "2"], response=None, answer="2", precision=1),
    )
    inspection.main([str(path), "--model", str(folder), "--prompt-style", "mcq"])
    out = capsys.readouterr().out
    assert "tokens of the prompt (mcq)" in out and "tokens of prompt and response" not in out
    assert f"bad: {path}: line 1: q1: the mcq prompt needs options" in out
    assert (
        "Options:\n    \n    A: 1\n    B: 2<|im_end|>" in out and "; correct to 1 decimals" in out
    )


def test_the_terminal_is_safe_and_long_texts_are_short(tmp_path, folder, capsys):
    path = written(
        tmp_path / "d.jsonl",
        worked(
            1,
            question="a\u001b[2Jb\u202ec" + "x" * 5000,
            domain="\u0007" * 50,
            answer="z" * 5000,
            response=None,
        ),
        {"\u001b": 1},
    )
    inspection.main([str(path), "--model", str(folder)])
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "a\\x1b[2Jb\\u202ecx" in out and "characters ...]" in out and len(out) < 4000


def test_a_text_only_model_takes_no_images(tmp_path, capsys):
    folder = tiny.make_folder(tmp_path / "text", "text")
    path = written(tmp_path / "d.jsonl", worked(1), worked(2, image="a.png"))
    inspection.main([str(path), "--model", str(folder)])
    assert (
        f"bad: {path}: line 2: question q2: this model has no vision tower"
        in capsys.readouterr().out
    )


def test_histogram_counts_every_example():
    lengths = Counter({40: 5, 41: 30, 97: 3, 250: 60, 999: 2, 50_000: 1})
    lines = list(inspection.histogram(lengths))
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == 101
    assert len(lines) <= 13 and "+" in lines[-1] and lines[0].split()[0] == "0"
    fullest = max(lines, key=lambda line: line.count("#"))
    assert fullest.split()[-1] == "60" and fullest.count("#") == 48
    assert all(("#" in line) == (line.split()[-1] != "0") for line in lines)
    assert [inspection.quantile(lengths, share) for share in (0.01, 0.5, 0.99, 1.0)] == [
        40,
        250,
        999,
        50_000,
    ]
    assert len(list(inspection.histogram(Counter({7: 3})))) == 1


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
        (["d.jsonl", "--model", "nowhere"], "nowhere/tokenizer.json"),
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
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_wrong_inputs_through_a_process(tmp_path):
    written(tmp_path / "d.jsonl", "{")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "inspect_data.py", "d.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "inspect_data.py: error: d.jsonl: none of the 1 records is good; d.jsonl: line 1: malformed"
    )
