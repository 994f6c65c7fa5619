"""Folders that people take for a model folder: read, or refused by what they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sft
import tiny
from data import ImageConfig, InputError, Tokenizer, load_image
from data.datasets import read_examples
from hub.config import Config
from model import Qwen2_5_VL
from sample import load_sampler

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def load(folder: Path) -> None:
    load_sampler(str(folder), "cpu", "float32")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def emptied(folder: Path, *names: str) -> None:
    """Leaves nothing in a folder but files of these names, without sense."""
    shutil.rmtree(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def without_weights(folder: Path, *names: str) -> None:
    """Leaves all but the weights, and adds files of these names."""
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"x")


# What the folder has been made into -> what the line says.
NO_MODEL_FOLDERS: dict[str, tuple[Callable, str]] = {
    "an adapter": (lambda f: emptied(f, "adapter_config.json"), "this is an adapter (LoRA)"),
    "an adapter with a config": (
        lambda f: without_weights(f, "adapter_config.json", "adapter_model.safetensors"),
        "this is an adapter (LoRA)",
    ),
    "a GGUF": (lambda f: emptied(f, "model-q4_k_m.gguf"), "this is a GGUF"),
    "a GGUF with a config": (lambda f: without_weights(f, "m.gguf"), "this is a GGUF"),
    "pickles": (lambda f: without_weights(f, "pytorch_model.bin"), "save them as safetensors"),
    "pickles in shards": (
        lambda f: without_weights(f, "pytorch_model-00001-of-00002.bin"),
        "save them as safetensors",
    ),
    "Meta's pickles": (lambda f: without_weights(f, "consolidated.00.pth"), "are pickles"),
    "shards without index": (
        lambda f: without_weights(f, "model-00001-of-00002.safetensors"),
        "there are shards, but not their index",
    ),
    "a hub cache": (lambda f: emptied(f, "snapshots/abc/config.json"), "this is a hub cache"),
    "a checkpoint": (lambda f: emptied(f, "__0_0.distcp"), "this is a checkpoint of training"),
    "a run": (
        lambda f: (f / "config.json").write_text('{"options": {}}'),
        "m: is a run folder: its model is in ",
    ),
    "empty": (emptied, "m: no such folder"),
    "no weights": (without_weights, "model.safetensors: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "a pointer for the weights": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "model.safetensors: a Git LFS pointer, not the file: `git lfs pull` gets it",
    ),
    "a pointer for the tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        "tokenizer.json: a Git LFS pointer",
    ),
    "a pointer for the config": (
        lambda f: (f / "config.json").write_text(POINTER),
        "config.json: a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("name", NO_MODEL_FOLDERS)
def test_what_is_no_model_folder_is_named(tmp_path, name):
    make, expected = NO_MODEL_FOLDERS[name]
    make(tiny.make_folder(tmp_path / "m"))
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2", "response": "<answer>2</answer>"}\n')
    command = ["--model", str(tmp_path / "m"), "--data", str(data), "--out", str(tmp_path / "o")]
    for use in (lambda: load(tmp_path / "m"), lambda: sft.main([*command, "--device", "cpu"])):
        with pytest.raises(InputError) as caught:
            use()
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_of_the_hub_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "/nowhere", "Qwen2.5-VL-3B-Instruct"):
        with pytest.raises(InputError, match=f"^{name}: no such folder .*hf download NAME"):
            load(name)


def test_a_file_is_no_model_folder(tmp_path):
    tiny.make_folder(tmp_path)
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(InputError, match=f"{name}: is a file, not a model folder"):
            load(tmp_path / name)


def test_an_adapter_beside_weights_changes_nothing(tmp_path):
    tiny.make_folder(tmp_path)
    before = Qwen2_5_VL.from_pretrained(tmp_path).state_dict()
    (tmp_path / "adapter_config.json").write_text("{}")
    load(tmp_path)
    after = Qwen2_5_VL.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("eos", [[], [270, 271], None, 0])
def test_ids_that_end_a_text_may_be_none_one_or_several(eos):
    config = Config.from_dict(tiny.config_dict() | {"eos_token_id": eos})
    assert config.eos_token_id == (270 if eos == [270, 271] else None if eos == [] else eos)


def test_the_precision_at_the_top_wins_under_its_newer_name_too():
    raw = tiny.nested_config(tiny.config_dict()) | {"dtype": "bfloat16"}
    raw["text_config"]["dtype"] = "float32"
    assert Config.from_dict(raw).torch_dtype == "bfloat16"


def test_a_tokenizer_may_begin_with_a_byte_order_mark(tmp_path):
    path = tiny.make_tokenizer(tmp_path) / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer.from_pretrained(tmp_path).encode("the") != []


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"min_pixels": True}, "min_pixels must be a whole number above 0, not True"),
        ({"min_pixels": 99999999}, "min_pixels 99999999 is above max_pixels 12845056"),
    ],
)
def test_odd_bounds_on_images_are_named(tmp_path, bounds, expected):
    tiny.make_folder(tmp_path)
    edit(tmp_path / "preprocessor_config.json", **bounds)
    with pytest.raises(InputError, match=expected):
        ImageConfig.from_pretrained(tmp_path)


def test_a_folder_of_links_into_a_cache_and_a_read_only_one_load(tmp_path):
    tiny.make_folder(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        path.chmod(0o444)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    snapshot.chmod(0o555)
    linked = Qwen2_5_VL.from_pretrained(snapshot).state_dict()
    load(snapshot)
    snapshot.chmod(0o755)
    direct = Qwen2_5_VL.from_pretrained(tmp_path / "blobs").state_dict()
    assert all(torch.equal(linked[name], direct[name]) for name in direct)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER.encode(), "a Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "compressed: unpack it with gunzip"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        ('{"question": "a"}\n'.encode("utf-16"), "in UTF-16: save it in UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tsv", "a.csv"])
def test_data_that_is_another_kind_of_file_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {expected}"):
        list(read_examples(tmp_path / name))


def test_an_image_that_is_a_pointer_is_named(tmp_path):
    (tmp_path / "a.png").write_text(POINTER)
    for name in (str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"):
        with pytest.raises(InputError, match="a.png: a Git LFS pointer"):
            load_image(name)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path, line):
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"question": "a", "answer": "1"}}\n{line}\n')
    with pytest.raises(InputError, match="deep.jsonl: line 2: malformed JSON"):
        list(read_examples(path))
