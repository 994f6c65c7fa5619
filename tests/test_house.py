"""The structure that README.md describes: rooms, arrows that point downwards, lengths."""

import os
import re

import torch

from tools import lines

ROOMS = {  # each room, and what it may import of ours besides itself
    "hub": set(),
    "answers": set(),
    "kernels": set(),
    "data": {"hub"},
    "vision.py": {"hub", "kernels"},
    "model.py": {"hub", "kernels", "vision.py"},
    "rewards.py": {"answers"},
    "sample.py": {"hub", "kernels", "data", "model.py"},
    "training": {"hub", "kernels", "data", "model.py", "rewards.py", "sample.py"},
    "sft.py": {"hub", "data", "model.py", "training", "rewards.py"},
    "grpo.py": {"hub", "data", "model.py", "training", "sample.py", "rewards.py"},
    "evaluate.py": {"hub", "data", "training", "sample.py", "rewards.py"},
}


def test_arrows_point_downwards_only():
    for name in lines.source_files():
        room = name.partition("/")[0]
        if room in ROOMS:
            used = {other.partition("/")[0] for other in lines.imports_of(name)} - {room}
            assert used <= ROOMS[room], name


def test_there_are_no_circles_and_no_wide_lines():
    files = lines.source_files()
    assert len(files) > 40 and lines.circles(files) == []
    for name in files:
        assert max(map(len, lines.lines_of(name)), default=0) <= 100, name


def test_a_circle_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from c import x\n")
    (tmp_path / "c.py").write_text("import a\n")
    (tmp_path / "d.py").write_text("import a\n")
    assert lines.source_files() == ["a.py", "b.py", "c.py", "d.py"]
    assert lines.circles(lines.source_files()) == ["a.py", "b.py", "c.py"]
    assert lines.closure("d.py") == {"a.py", "b.py", "c.py", "d.py"}


def test_the_readme_says_how_long_the_reading_path_is():
    readme = (lines.ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 160
    said = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", readme, re.MULTILINE))
    assert list(said) == list(lines.READING_PATH)
    for name, count in said.items():
        assert abs(int(count) - len(lines.lines_of(name))) <= 0.05 * int(count), name


def test_a_gpu_is_out_of_sight_unless_it_is_asked_for():
    """So everything is tested on the CPU, on every machine; commands inherit it."""
    if os.environ.get("TEST_ON") != "gpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
