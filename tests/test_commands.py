"""Every command from end to end on tiny model folders, exact resume, answers to wrong inputs."""

import base64
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import grpo
import sample
import sft
import tiny
from hub import options as hub_options
from kill_nine import assert_same_end, steps_saved
from model import Qwen2_5_VL
from tools import chat
from training import run as run_folder

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"sample": sample, "chat": chat, "sft": sft, "grpo": grpo, "evaluate": evaluate}
SFT_FIELDS = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"}
GRPO_FIELDS = SFT_FIELDS | {
    "reward",
    "reward_std",
    "zero_std_groups",
    "advantage_mean",
    "response_length",
    "clipped_responses",
    "entropy",
    "kl",
    "ratio_mean",
    "clip_fraction",
    "logprob_diff",
    "rollout_seconds",
    "train_seconds",
    "rollout_tokens_per_second",
}
SFT_RUN = [
    "--epochs",
    "4",
    "--max-steps",
    "5",
    "--batch-size",
    "4",
    "--pack-tokens",
    "300",
    "--learning-rate",
    "1e-3",
]
GRPO_RUN = [
    "--epochs",
    "4",
    "--max-steps",
    "5",
    "--questions-per-step",
    "3",
    "--group-size",
    "3",
    "--pack-tokens",
    "300",
    "--max-new-tokens",
    "12",
    "--learning-rate",
    "1e-3",
]


def run_process(command: str, *argv, stdin: str = "", cwd: Path) -> subprocess.CompletedProcess:
    """The command as a user starts it."""
    folder = ROOT / "tools" if command == "chat" else ROOT
    return subprocess.run(
        [sys.executable, folder / f"{command}.py", *map(str, argv)],
        cwd=cwd,
        input=stdin,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """The same in this process: (exit code, stdout, stderr's lines but for progress bars)."""

    def call(command: str, *argv) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{command}.py", *map(str, argv)])
        code = 0
        try:
            hub_options.run_command(COMMANDS[command].main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, error_lines(err)

    return call


def error_lines(stderr: str) -> list[str]:
    return [
        line
        for line in re.split(r"[\r\n]+", stderr)
        if line.strip() and not re.match(r"[\w-]+:\s+\d+%\|", line)
    ]


class Workshop:
    """Makes model folders, data and pictures in a temporary folder."""

    def __init__(self, path: Path):
        self.path = path

    def model(self, variant: str = "vl", **options) -> Path:
        return tiny.make_folder(self.path / "model", variant, **options)

    def model_without(self, name: str, variant: str = "vl", **options) -> Path:
        folder = self.model(variant, **options)
        (folder / name).unlink()
        return folder

    def model_with(self, name: str, content: str | bytes) -> Path:
        """A model folder in which one file holds something else."""
        folder = self.model()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    def model_config(self, **changes) -> Path:
        return self.model_with("config.json", json.dumps(tiny.config_dict() | changes))

    def model_weights(self, change) -> Path:
        """A model folder whose tensors went through `change`, which edits the dict."""
        folder = self.model()
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        return folder

    def cut(self, path: Path, share: float = 0.5) -> Path:
        """Truncates a file."""
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * share)])
        return path

    def file(self, name: str, content: str | bytes) -> Path:
        (self.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return self.path / name

    def data(self, *records: dict, name: str = "questions.jsonl") -> Path:
        return self.file(name, "".join(json.dumps(record) + "\n" for record in records))

    def picture(self, width: int = 70, height: int = 60, name: str = "picture.png") -> Path:
        Image.effect_noise((width, height), 80).convert("RGB").save(self.path / name)
        return self.path / name

    def under_a_file(self, name: str) -> Path:
        """A path that nobody can write to, root neither."""
        return self.file("occupied", "a file") / name


@pytest.fixture
def shop(tmp_path) -> Workshop:
    return Workshop(tmp_path)


def question(i: int, **fields) -> dict:
    return {"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i), **fields}


def worked(i: int) -> dict:
    return question(
        i, response=f"<think>\n{i} and {i} are {2 * i}\n</think> <answer>{2 * i}</answer>"
    )


def sft_data(shop: Workshop) -> Path:
    return shop.data(*map(worked, range(10)), name="sft.jsonl")


def rl_data(shop: Workshop) -> Path:
    return shop.data(*map(question, range(8)), name="rl.jsonl")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run_folder(folder: Path, fields: set[str], steps: int, *, samples: bool) -> None:
    names = {"config.json", "metrics.jsonl", "checkpoint", "model"}
    names.add("samples.jsonl" if samples else "rows.npz")  # GRPO's, or SFT's
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["out"] and config["torch"] == torch.__version__ and "commit" in config
    metrics = records(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    for m in metrics:
        assert fields <= m.keys() and all(math.isfinite(m[key]) for key in m)
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        assert (folder / "model" / name).exists()


# --- All commands, as a user starts them ---


def test_every_command_end_to_end(shop):
    base, picture, cwd = shop.model(), shop.picture(), shop.path
    done = run_process(
        "sft", "--model", base, "--data", sft_data(shop), "--out", "runs/a", *SFT_RUN, cwd=cwd
    )
    assert done.returncode == 0 and not error_lines(done.stderr), done.stderr
    check_run_folder(cwd / "runs/a", SFT_FIELDS, 5, samples=False)
    losses = [m["loss"] for m in records(cwd / "runs/a/metrics.jsonl")]
    assert losses[-1] < losses[0]

    done = run_process(
        "grpo",
        "--model",
        "runs/a/model",
        "--data",
        rl_data(shop),
        "--out",
        "runs/b",
        *GRPO_RUN,
        "--max-steps",
        "2",
        "--kl-coef",
        "0.1",
        cwd=cwd,
    )
    assert done.returncode == 0 and not error_lines(done.stderr), done.stderr
    check_run_folder(cwd / "runs/b", GRPO_FIELDS, 2, samples=True)
    assert all(m["logprob_diff"] < 1e-5 for m in records(cwd / "runs/b/metrics.jsonl"))
    samples = records(cwd / "runs/b/samples.jsonl")
    assert len(samples) == 2 * 3 * 3
    assert {"step", "question", "response", "extracted", "answer", "reward"} <= samples[0].keys()
    assert all(s["reward"] in (0.0, 1.0) for s in samples)

    questions = shop.data(
        question(1, domain="sums"), question(2, image=str(picture), domain="pictures")
    )
    done = run_process(
        "evaluate",
        "--model",
        "runs/b/model",
        "--data",
        questions,
        "--max-new-tokens",
        "8",
        "--json",
        cwd=cwd,
    )
    assert done.returncode == 0 and not error_lines(done.stderr), done.stderr
    result = json.loads(done.stdout)
    assert result["n"] == 2 and result["by_domain"].keys() == {"sums", "pictures"}

    done = run_process(
        "sample",
        "--model",
        "runs/b/model",
        "--prompt",
        "What is this?",
        "--image",
        picture,
        "--json",
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
        cwd=cwd,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(json.loads(done.stdout)["completions"]) == 1


def test_sample_json(run, shop):
    argv = [
        "--model",
        shop.model(),
        "--prompt",
        "Hello <|im_end|>",
        "--image",
        shop.picture(),
        "--n",
        "3",
        "--json",
        "--max-new-tokens",
        "9",
        "--system",
        "Be brief.",
    ]
    code, out, err = run("sample", *argv)
    result = json.loads(out)
    assert code == 0 and err == [] and out.count("\n") == 1
    assert result.keys() == {"prompt_ids", "completions", "usage"}
    assert result["usage"].keys() == {
        "prompt_tokens",
        "completion_tokens",
        "seconds",
        "tokens_per_second",
    }
    assert len(result["completions"]) == 3
    for completion in result["completions"]:
        assert completion.keys() == {"ids", "log_probs", "text", "finish_reason"}
        assert (
            completion["finish_reason"] in ("stop", "length")
            and len(completion["ids"]) == len(completion["log_probs"]) <= 9
        )
        assert all(p < 0 for p in completion["log_probs"])
    assert result["usage"]["prompt_tokens"] == len(result["prompt_ids"])
    assert result["usage"]["completion_tokens"] == sum(len(c["ids"]) for c in result["completions"])
    ids = tiny.special_ids()
    assert result["prompt_ids"].count(ids["im_end"]) == 2  # that of the prompt's text is text
    assert result["prompt_ids"].count(ids["image_pad"]) == 4  # 70 x 60 pixels become 56 x 56
    assert (
        result["prompt_ids"].index(ids["image_pad"]) < len(result["prompt_ids"]) - 20
    )  # before the text
    again = json.loads(run("sample", *argv)[1])
    assert again["completions"] == result["completions"]


def test_sample_json_stays_json_where_a_forced_id_was_impossible(run, shop):
    code, out, _ = run(
        "sample",
        "--model",
        shop.model(),
        "--prompt",
        "Hi",
        "--json",
        "--think-budget",
        "2",
        "--top-k",
        "1",
        "--max-new-tokens",
        "12",
    )
    [completion] = json.loads(out, parse_constant=lambda name: pytest.fail(name))["completions"]
    assert code == 0 and "</think>" in completion["text"] and None in completion["log_probs"]


def test_sample_text(run, shop):
    code, out, _ = run(
        "sample",
        "--model",
        shop.model("text"),
        "--prompt",
        "Hi",
        "--n",
        "2",
        "--max-new-tokens",
        "4",
    )
    assert code == 0 and "\n---\n" in out


def test_chat(shop):
    picture = shop.picture()
    lines = [
        "hello",
        f"/image {picture}",
        "what is it?",
        "/image nowhere.png",
        "",
        "/reset",
        "hello",
        "/quit",
        "never read",
    ]
    done = run_process(
        "chat",
        "--model",
        shop.model(),
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        stdin="\n".join(lines),
        cwd=shop.path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        [line for line in done.stderr.splitlines() if "error" in line]
        == [line for line in done.stderr.splitlines() if line.startswith("error: nowhere.png: ")]
        != []
    )


def test_chat_remembers_images_and_turns_until_reset(run, shop, monkeypatch):
    lines = [
        "hello",
        f"/image {shop.picture()}",
        "what is it?",
        "and now?",
        "x" * 600,
        "\udc80",
        "/reset",
        "hello",
    ]
    asked, generate = [], sample.Sampler.generate

    def spy(sampler, prompts, params, **options):
        result = generate(sampler, prompts, params, **options)
        asked.append((prompts[0], result[0][0]))
        return result

    monkeypatch.setattr(sample.Sampler, "generate", spy)
    raw = "\n".join(lines).encode("utf-8", "surrogateescape")  # one line is not UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
    code, out, err = run(
        "chat",
        "--model",
        shop.model(),
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "--system",
        "Hm.",
    )
    (first, answer), (second, _), (third, _), (_, _), (after_reset, answer_again) = asked
    assert code == 0
    assert not first.grids and len(second.grids) == 1 and third.grids == second.grids
    assert second.ids[: len(first.ids)] == first.ids and third.ids[: len(second.ids)] == second.ids
    assert after_reset.ids == first.ids and answer_again.ids == answer.ids and not after_reset.grids
    assert out.startswith(answer.text)
    assert (
        len([line for line in err if line.startswith("error:") and "context of 512" in line]) == 1
    )  # and it goes on


def test_evaluate_json_with_runs_and_records(run, shop):
    files = [
        shop.data(*map(question, range(3)), name="one.jsonl"),
        shop.data(
            question(
                7, image="picture.png", options={"A": "13", "B": "14"}, answer="B", domain="d"
            ),
            name="two.jsonl",
        ),
    ]
    shop.picture()
    argv = [
        "--model",
        shop.model(),
        "--data",
        *files,
        "--max-new-tokens",
        "12",
        "--max-batch",
        "4",
        "--think-budget",
        "3",
    ]
    code, out, err = run(
        "evaluate",
        *argv,
        "--runs",
        "2",
        "--temperature",
        "0.5",
        "--json",
        "--out",
        shop.path / "out.jsonl",
    )
    assert code == 0 and err == []
    one, two = map(json.loads, out.splitlines())
    for result, n in ((one, 3), (two, 1)):
        assert {
            "n",
            "accuracy",
            "stderr",
            "avg@2",
            "maj@2",
            "pass@2",
            "unparsed",
            "mean_words",
            "forced",
            "by_domain",
        } <= result.keys()
        assert (
            result["n"] == n
            and result["forced"] == 1.0
            and 0 <= result["accuracy"] <= result["pass@2"] <= 1
        )
        assert all(v["n"] <= n for v in result["by_domain"].values())
    assert len(records(shop.path / "out.jsonl")) == 8
    assert {"id", "run", "prompt", "response", "extracted", "correct"} <= records(
        shop.path / "out.jsonl"
    )[0].keys()
    code, out, _ = run("evaluate", *argv, "--limit", "1", "--mask-images")
    table = out.splitlines()
    assert code == 0 and [line.split()[:2] for line in table] == [
        ["file", "n"],
        ["one", "1"],
        ["two", "1"],
    ]
    code, out, _ = run("evaluate", *argv, "--limit", "1", "--json")
    assert not [key for key in json.loads(out.splitlines()[0]) if "@" in key]


def test_answer_only_and_dropped_examples(run, shop):
    data = shop.data(worked(1), question(2, question="why? " * 90, response="so"), worked(3))
    argv = [
        "--model",
        shop.model("text"),
        "--data",
        data,
        "--max-steps",
        "1",
        "--max-length",
        "200",
        "--batch-size",
        "9",
    ]
    code, _, err = run("sft", *argv, "--out", shop.path / "cot")
    assert code == 0 and "1 of 3 examples dropped" in err[0]
    assert run("sft", *argv, "--out", shop.path / "answers", "--answer-only")[0] == 0
    tokens = [
        records(shop.path / name / "metrics.jsonl")[0]["tokens"] for name in ("cot", "answers")
    ]
    assert tokens[1] < tokens[0]


@pytest.mark.parametrize(
    "command, make, extra", [("sft", worked, SFT_RUN), ("grpo", question, GRPO_RUN)]
)
def test_bad_lines_are_skipped_if_asked(run, shop, command, make, extra):
    """Training is then the same as on the good lines alone."""
    model, good = shop.model(), [json.dumps(make(i)) for i in range(1, 9)]
    bad = shop.file(
        "bad.jsonl", "\n".join(["{", *good[:5], '{"question": 3}', *good[5:], '{"a": 1}', "[", "x"])
    )
    argv = [command, "--model", model, *extra, "--max-steps", "2", "--data"]
    code, _, [line] = run(*argv, bad, "--out", shop.path / "run")
    assert (
        code == 2
        and "bad.jsonl: line 1: malformed JSON" in line
        and not (shop.path / "run").exists()
    )
    code, _, [first, *shown, rest] = run(*argv, bad, "--out", shop.path / "run", "--skip-bad-lines")
    assert code == 0 and first == f"{bad}: 5 bad records left out" and rest.strip() == "..."
    assert [line.strip().removeprefix(f"{bad}: ")[:7] for line in shown] == [
        "line 1:",
        "line 7:",
        "line 11",
    ]
    assert run(*argv, shop.file("good.jsonl", "\n".join(good)), "--out", shop.path / "good")[0] == 0
    assert_same_end(shop.path / "run", shop.path / "good")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and err == [] and "--model" in out and "--device" in out
    assert ("--recipe" in out) == (command in ("sft", "grpo"))


# --- Resume ---


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int) -> None:
    """The run dies behind the metrics of a step, before anything of it is saved."""
    log = run_folder.Run.log

    def dying_log(self, name, *lines):
        log(self, name, *lines)
        if name == "metrics.jsonl" and lines[0]["step"] == step:
            raise Killed

    monkeypatch.setattr(run_folder.Run, "log", dying_log)


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_end(one, other)
    assert len({m["loss"] for m in records(one / "metrics.jsonl")}) > 1
    names = {path.name for path in one.iterdir()} - {"samples.jsonl", "rows.npz"}
    assert names == {"config.json", "metrics.jsonl", "checkpoint", "model"}


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(run, shop, monkeypatch, command):
    # Rewards that differ within a group, so that an untrained model has something to learn.
    monkeypatch.setattr(
        grpo, "accuracy_reward", lambda response, *_, **__: float(len(response) % 2)
    )
    data, extra = (
        (sft_data(shop), SFT_RUN)
        if command == "sft"
        else (rl_data(shop), [*GRPO_RUN, "--updates-per-rollout", "2"])
    )
    argv = [command, "--model", shop.model(), "--data", data, *extra, "--save-every", "2", "--out"]
    whole, cut = shop.path / "whole", shop.path / "cut"
    assert run(*argv, whole)[0] == 0
    before = (whole / "model" / "model.safetensors").read_bytes()
    assert before != (shop.path / "model" / "model.safetensors").read_bytes()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        run(*argv, cut)
    assert records(cut / "metrics.jsonl")[-1]["step"] == 3
    assert steps_saved(cut) == 2
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the machine went down in the middle of a line
    code, out, err = run(*argv, cut, "--resume")
    assert (code, err) == (0, [])
    assert_same_run(whole, cut)

    # Died in the middle of writing the checkpoint of step 4.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        run(*argv, cut, "--overwrite")
    (cut / "checkpoint/step-000004.tmp").mkdir()
    assert run(*argv, cut, "--resume")[0] == 0
    assert_same_run(whole, cut)

    assert run(*argv, cut, "--resume")[0] == 0  # nothing left to do, nothing changed
    assert_same_run(whole, cut)


def test_a_run_is_not_replaced_unless_told_to(run, shop):
    argv = [
        "sft",
        "--model",
        shop.model(),
        "--data",
        sft_data(shop),
        "--max-steps",
        "1",
        "--out",
        shop.path / "run",
    ]
    assert run(*argv)[0] == 0
    metrics = (shop.path / "run" / "metrics.jsonl").read_text()
    code, _, [line] = run(*argv)
    assert (
        code == 2
        and line.startswith("sft.py: error: ")
        and str(shop.path / "run") in line
        and "--overwrite" in line
    )
    assert (shop.path / "run" / "metrics.jsonl").read_text() == metrics
    assert run(*argv, "--overwrite", "--seed", "1")[0] == 0
    assert len(records(shop.path / "run" / "metrics.jsonl")) == 1
    assert json.loads((shop.path / "run" / "config.json").read_text())["options"]["seed"] == 1


# --- Wrong inputs ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def ask(model: Path, *argv) -> list:
    return ["sample", "--model", model, "--prompt", "Hi", "--max-new-tokens", "2", *argv]


def look(s: Workshop, content: bytes | None = None, name: str = "bad.png") -> list:
    """Asks about a picture that holds `content`."""
    return ask(s.model(), "--image", s.path / name if content is None else s.file(name, content))


def examine(s: Workshop, data: Path, *argv) -> list:
    return ["evaluate", "--model", s.model(), "--data", data, "--max-new-tokens", "2", *argv]


def tune(s: Workshop, data: Path | None = None, *argv, model: Path | None = None) -> list:
    return [
        "sft",
        "--model",
        model or s.model(),
        "--data",
        data or sft_data(s),
        "--out",
        s.path / "run",
        "--max-steps",
        "2",
        *argv,
    ]


def reinforce(s: Workshop, data: Path | None = None, *argv, model: Path | None = None) -> list:
    return [
        "grpo",
        "--model",
        model or s.model(),
        "--data",
        data or rl_data(s),
        "--out",
        s.path / "run",
        "--max-steps",
        "2",
        "--max-new-tokens",
        "4",
        *argv,
    ]


def resumed(s: Workshop, change) -> list:
    """Resumes a run whose folder went through `change`."""
    argv = tune(s, None, "--max-steps", "1")
    sft.main(list(map(str, argv[1:])))
    change(s.path / "run")
    return [*argv, "--resume"]


def shard(s: Workshop, number: int) -> Path:
    return s.model(shards=3) / f"model-{number:05d}-of-00003.safetensors"


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


NAN = float("nan")
OTHER_HEAD = "model.layers.0.self_attn.q_proj.bias"
WRONG = {
    # model folders
    "no folder": (lambda s: ask(s.path / "nowhere"), "nowhere"),
    "no config": (lambda s: ask(s.model_without("config.json")), "config.json"),
    "malformed config": (
        lambda s: ask(s.model_with("config.json", '{"model_type": "qwen2",')),
        "config.json",
    ),
    "config is a list": (lambda s: ask(s.model_with("config.json", "[1]")), "config.json"),
    "other architecture": (
        lambda s: ask(s.model_config(model_type="llama")),
        "config.json",
        "model_type",
        "llama",
    ),
    "config field missing": (
        lambda s: ask(s.model_config(hidden_size=None)),
        "config.json",
        "hidden_size",
    ),
    "bad rope type": (
        lambda s: ask(s.model_config(rope_scaling={"type": "yarn"})),
        "config.json",
        "yarn",
    ),
    "no weights": (lambda s: ask(s.model_without("model.safetensors")), "model.safetensors"),
    "missing shard": (
        lambda s: shard(s, 2).unlink() or ask(s.path / "model"),
        "model-00002-of-00003.safetensors",
    ),
    "truncated shard": (
        lambda s: s.cut(shard(s, 3)) and ask(s.path / "model"),
        "model-00003-of-00003.safetensors",
    ),
    "empty weights": (lambda s: ask(s.model_with("model.safetensors", "")), "model.safetensors"),
    "malformed index": (
        lambda s: (
            shard(s, 1)
            and s.file("model/model.safetensors.index.json", "{}")
            and ask(s.path / "model")
        ),
        "model.safetensors.index.json",
        "weight_map",
    ),
    "missing key": (
        lambda s: ask(s.model_weights(lambda w: w.pop(OTHER_HEAD))),
        "missing",
        OTHER_HEAD,
    ),
    "unexpected key": (
        lambda s: ask(s.model_weights(lambda w: w.update(extra=torch.ones(2)))),
        "unexpected",
        "extra",
    ),
    "wrong shape": (
        lambda s: ask(s.model_weights(lambda w: w.update({OTHER_HEAD: torch.ones(5)}))),
        OTHER_HEAD,
        "[5]",
        "[64]",
    ),
    "NaN weights": (
        lambda s: ask(s.model_weights(lambda w: w[OTHER_HEAD].fill_(NAN))),
        OTHER_HEAD,
        "NaN",
    ),
    "no tokenizer": (lambda s: ask(s.model_without("tokenizer.json")), "tokenizer.json"),
    "malformed tokenizer": (
        lambda s: ask(s.model_with("tokenizer.json", '{"model": 3}')),
        "tokenizer.json",
    ),
    "tokenizer of another model": (
        lambda s: ask(
            s.model_with(
                "tokenizer.json",
                json.dumps(
                    {
                        "version": "1.0",
                        "added_tokens": [],
                        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
                    }
                ),
            )
        ),
        "tokenizer.json",
        "<|",
    ),
    "no preprocessor": (
        lambda s: ask(s.model_without("preprocessor_config.json")),
        "preprocessor_config.json",
    ),
    "bad preprocessor": (
        lambda s: ask(s.model_with("preprocessor_config.json", '{"min_pixels": -1}')),
        "preprocessor_config.json",
        "min_pixels",
    ),
    "more ids than rows, sample": (
        lambda s: ask(s.model("text", vocab_rows=271)),
        "271",
        "tokenizer",
    ),
    "more ids than rows, sft": (
        lambda s: tune(s, model=s.model("text", vocab_rows=271)),
        "271",
        "tokenizer",
    ),
    "more ids than rows, grpo": (
        lambda s: reinforce(s, model=s.model("text", vocab_rows=271)),
        "271",
        "tokenizer",
    ),
    # data
    "no data file": (lambda s: tune(s, s.path / "nowhere.jsonl"), "nowhere.jsonl"),
    "data is a folder": (lambda s: examine(s, s.path), "cannot be read"),
    "empty data file": (lambda s: examine(s, s.file("empty.jsonl", "\n")), "empty.jsonl"),
    "malformed line": (
        lambda s: reinforce(
            s, s.file("x.jsonl", json.dumps(question(1)) + '\n{"question": "?", "ans')
        ),
        "x.jsonl",
        "line 2",
    ),
    "record is a number": (lambda s: tune(s, s.file("x.jsonl", "3\n")), "x.jsonl", "line 1"),
    "unknown schema": (
        lambda s: examine(s, s.data({"theme": "?"})),
        "questions.jsonl",
        "line 1",
        "theme",
    ),
    "field of another type": (
        lambda s: examine(s, s.data(question(1, question=["?"]))),
        "questions.jsonl",
        "line 1",
        "'question'",
    ),
    "no response": (lambda s: tune(s, rl_data(s)), "rl.jsonl", "q0", "response"),
    "no answer": (
        lambda s: reinforce(s, s.data(question(1), {"question": "?"})),
        "questions.jsonl",
        "line 2",
        "answer",
    ),
    "answer is none of the options": (
        lambda s: examine(s, s.data(question(4, options={"A": "x", "B": "y"}))),
        "line 1",
        "answer",
        "options",
    ),
    "mcq without options": (
        lambda s: examine(s, s.data(question(1)), "--prompt-style", "mcq"),
        "questions.jsonl",
        "q1",
        "options",
    ),
    "ids twice": (lambda s: examine(s, s.data(question(1), question(1))), "questions.jsonl", "id"),
    "image in sft": (
        lambda s: tune(s, s.data(worked(1) | {"image": str(s.picture())})),
        "questions.jsonl",
        "q1",
        "image",
    ),
    "image in grpo": (
        lambda s: reinforce(s, s.data(question(1, image=str(s.picture())))),
        "questions.jsonl",
        "q1",
        "image",
    ),
    "nothing fits max-length": (
        lambda s: tune(s, None, "--max-length", "20"),
        "sft.jsonl",
        "--max-length",
    ),
    # images
    "missing image": (lambda s: look(s), "bad.png", "No such file"),
    "not an image": (lambda s: look(s, b"plain text"), "bad.png", "not an image"),
    "empty image": (lambda s: look(s, b""), "bad.png"),
    "truncated image": (
        lambda s: ask(s.model(), "--image", s.cut(s.picture(), 0.7)),
        "picture.png",
        "truncated",
    ),
    "zero-sized image": (lambda s: look(s, png_header(0, 4)), "bad.png"),
    "image over aspect ratio 200": (
        lambda s: ask(s.model(), "--image", s.picture(603, 3)),
        "picture.png",
        "aspect ratio",
        "603 x 3",
    ),
    "image is a folder": (lambda s: ask(s.model(), "--image", s.path), "cannot be read"),
    "missing image of a question": (
        lambda s: examine(s, s.data(question(1), question(2, image="gone.png"))),
        "questions.jsonl",
        "q2",
        "gone.png",
    ),
    "bad data URI": (
        lambda s: examine(s, s.data(question(1, image=data_uri(b"no")))),
        "questions.jsonl",
        "q1",
        "not an image",
    ),
    "text-only model and an image": (
        lambda s: ask(s.model("text"), "--image", s.picture()),
        "takes no images",
    ),
    "text-only model and image questions": (
        lambda s: [
            "evaluate",
            "--model",
            s.model("text"),
            "--data",
            s.data(question(1), question(2, image=str(s.picture()))),
        ],
        "questions.jsonl",
        "q2",
        "takes no images",
    ),
    # context
    "prompt over the context": (lambda s: ask(s.model(), "--system", "a" * 600), "prompt", "512"),
    "questions over the context, grpo": (
        lambda s: reinforce(s, s.data(question(2, question="?" * 600))),
        "questions.jsonl",
        "the prompt is over 511 tokens",
    ),
    "questions over the context, evaluate": (
        lambda s: [
            "evaluate",
            "--model",
            s.model(),
            "--data",
            rl_data(s),
            s.data(question(2, question="?" * 600), name="second.jsonl"),
        ],
        "second.jsonl",
        "no example is left: their prompts do not fit the context of 512 tokens",
    ),
    # options
    "unknown option": (lambda s: ["sample", "--promt", "Hi"], "--promt"),
    "abbreviated option": (lambda s: ["sft", "--learn", "3"], "--learn"),
    "stray word": (lambda s: ["evaluate", "micro/base"], "micro/base"),
    "malformed value": (lambda s: ["sample", "--n", "three"], "--n", "three"),
    "fraction for a whole number": (lambda s: ["sft", "--epochs", "1.5"], "--epochs", "1.5"),
    "value left out": (lambda s: ["sample", "--prompt"], "--prompt"),
    "out of range": (lambda s: ["sample", "--top-p", "1.5"], "--top-p", "1.5"),
    "negative": (lambda s: ["sample", "--temperature", "-1"], "--temperature", "-1"),
    "not a number": (lambda s: ["grpo", "--learning-rate", "nan"], "--learning-rate", "nan"),
    "infinite": (lambda s: ["sample", "--temperature", "inf"], "--temperature", "inf"),
    "group of one": (lambda s: ["grpo", "--group-size", "1"], "--group-size", "1"),
    "bad choice": (lambda s: ["evaluate", "--prompt-style", "haiku"], "--prompt-style", "haiku"),
    "bad recipe": (lambda s: ["sft", "--recipe", "cake"], "--recipe", "cake"),
    "recipe where there is none": (lambda s: ["sample", "--recipe", "micro"], "--recipe"),
    "bad device": (lambda s: ask(s.model(), "--device", "abacus"), "--device", "abacus"),
    "unsupported device": (lambda s: tune(s, None, "--device", "meta"), "--device", "meta"),
    "bad dtype": (lambda s: ask(s.model(), "--dtype", "int3"), "--dtype", "int3"),
    "greedy runs": (lambda s: examine(s, rl_data(s), "--runs", "5"), "--runs", "--temperature"),
    "text not in Unicode": (lambda s: ask(s.model(), "--system", "\udc80"), "Unicode"),
    # run folders
    "sft out under a file": (lambda s: tune(s, None, "--out", s.under_a_file("run")), "occupied"),
    "grpo out under a file": (
        lambda s: reinforce(s, None, "--out", s.under_a_file("run")),
        "occupied",
    ),
    "evaluate out under a file": (
        lambda s: examine(s, rl_data(s), "--out", s.under_a_file("x.jsonl")),
        "occupied",
    ),
    "evaluate out in no folder": (
        lambda s: examine(s, rl_data(s), "--out", s.path / "gone" / "x.jsonl"),
        "gone",
    ),
    "out is a run": (lambda s: resumed(s, lambda run: None)[:-1], "run", "--overwrite"),
    "evaluate out is the data": (lambda s: examine(s, rl_data(s), "--out", rl_data(s)), "--out"),
    "evaluate without its data": (
        lambda s: examine(s, s.path / "gone.jsonl"),
        "gone.jsonl: cannot be read",
    ),
    "evaluate a file twice": (lambda s: ["evaluate", "--data", "x.jsonl", "x.jsonl"], "--data"),
    "json without a prompt": (lambda s: ["sample", "--json"], "--prompt"),
    "image without a prompt": (lambda s: ["sample", "--image", "x.png"], "--prompt"),
    "momentum of one": (lambda s: ["sft", "--beta1", "1.0"], "--beta1"),
    "resume without a run": (lambda s: tune(s, None, "--resume"), "run"),
    "resume without a checkpoint": (
        lambda s: resumed(s, lambda run: (run / "checkpoint").rename(run / "gone")),
        "checkpoint",
    ),
    "resume with other options": (
        lambda s: [*resumed(s, lambda run: None), "--learning-rate", "0.5"],
        "--learning-rate",
        "0.0002",
    ),
    "resume from damaged weights": (
        lambda s: resumed(s, lambda run: s.cut(run / "checkpoint/step-000001/__0_0.distcp")),
        "checkpoint/step-000001: damaged (__0_0.distcp",
    ),
    "resume from a damaged state": (
        lambda s: resumed(s, lambda run: s.file("run/checkpoint/step-000001/state.json", "{}")),
        "state.json",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_give_one_line_and_exit_code_2(run, shop, monkeypatch, capsys, name):
    make, *fragments = WRONG[name]
    argv = make(shop)
    capsys.readouterr()
    # Nothing is sampled or trained before the complaint.
    monkeypatch.setattr(sample.Rollout, "prefill", lambda *_: pytest.fail("sampled first"))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("trained first"))
    code, out, err = run(*argv)
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith(f"{argv[0]}.py: error: ") and len(err[0]) < 500
    for fragment in fragments:
        assert fragment in err[0]


@pytest.mark.parametrize("name", ["truncated shard", "evaluate out under a file"])
def test_wrong_inputs_through_a_process(shop, name):
    make, *fragments = WRONG[name]
    command, *argv = make(shop)
    done = run_process(command, *argv, cwd=shop.path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"{command}.py: error: ")
        and done.stderr.count("\n") == 1
        and "Traceback" not in done.stderr
    )
    for fragment in fragments:
        assert fragment in done.stderr


def test_an_interrupt_is_not_an_error(run, shop, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2_5_VL, "forward", interrupt)
    assert run(*ask(shop.model())) == (130, "", [])


def run_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
        "of which 1.23 GiB is free. Including non-PyTorch memory, ..."
    )


SHORTAGE = ": 2.00 GiB were asked for, 1.23 GiB of the 79.10 GiB of GPU 0 are free; what helps: "


@pytest.mark.parametrize(
    "command, remedies",
    [("sample", "a lower --max-new-tokens, a lower --n"), ("evaluate", "a lower --max-batch, ")],
)
def test_out_of_memory_while_sampling_is_one_line(run, shop, monkeypatch, command, remedies):
    argv = ["--prompt", "Hello"] if command == "sample" else ["--data", shop.data(question(1))]
    model = shop.model()
    monkeypatch.setattr(Qwen2_5_VL, "forward", run_out_of_memory)
    code, out, [line] = run(command, "--model", model, *argv)
    assert (code, out) == (2, "")
    assert line.startswith(f"{command}.py: error: out of memory in sampling{SHORTAGE}{remedies}")


def test_out_of_memory_while_loading_is_one_line(run, shop, monkeypatch):
    monkeypatch.setattr(Qwen2_5_VL, "from_pretrained", run_out_of_memory)
    code, _, [line] = run(*ask(shop.model()))
    assert code == 2 and f"out of memory in loading the model{SHORTAGE}--dtype bfloat16" in line


def test_chat_drops_images_that_cannot_be_used_and_goes_on(run, tmp_path, shop, monkeypatch):
    folder = tiny.make_folder(tmp_path / "text", "text")
    said = f"/image {shop.picture()}\nhello\nhello\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), "utf-8"))
    code, out, err = run("chat", "--model", folder, "--max-new-tokens", "2")
    errors = [line for line in err if "no vision tower" in line]
    assert code == 0 and len(errors) == 1 and "the images of this message are dropped" in err
    code, _, err = run("chat", "--model", folder, "--n", "5")
    assert code == 2 and "--n 5" in err[-1]


def test_chat_goes_on_when_memory_has_run_out(run, shop, monkeypatch):
    model = shop.model()
    monkeypatch.setattr(Qwen2_5_VL, "forward", run_out_of_memory)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nhello\n"), "utf-8"))
    code, _, err = run("chat", "--model", model)
    errors = [line for line in err if line.startswith("error: out of memory in the answer: 2.00")]
    assert code == 0 and len(errors) == 2


def interrupt_at(monkeypatch, step: int) -> None:
    """Ctrl-C in a decoding step."""
    forward, steps = sample.Rollout.forward, []

    def interrupted(rollout, B):
        steps.append(B)
        if len(steps) == step:
            raise KeyboardInterrupt
        forward(rollout, B)

    monkeypatch.setattr(sample.Rollout, "forward", interrupted)


def test_ctrl_c_while_evaluating_counts_what_is_answered(run, shop, monkeypatch):
    data, out_file = shop.data(*map(question, range(4))), shop.path / "out.jsonl"
    interrupt_at(monkeypatch, 10)
    code, out, err = run(
        "evaluate",
        "--model",
        shop.model(),
        "--data",
        data,
        "--max-batch",
        1,
        "--max-new-tokens",
        5,
        "--out",
        out_file,
        "--json",
    )
    assert (code, err) == (130, [])
    answered = len(out_file.read_text().splitlines())
    assert 1 <= answered < 4 and json.loads(out)["n"] == answered
