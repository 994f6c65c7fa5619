"""`python tools/plot.py RUN ...`: what is read and chosen, smoothing, and the picture itself."""

import json
import sys
from pathlib import Path

import pytest

from hub.errors import InputError
from hub.options import parse_options
from tools import plot

SFT = {"epoch": 0, "loss": 1.5, "lr": 1e-4, "grad_norm": 2.0, "tokens_per_second": 900.0}
GRPO = {"reward": 0.5, "loss": 0.1, "kl": 0.0, "response_length": 90.0, "entropy": 0.3, "lr": 1e-5}


def make_run(folder: Path, fields: dict, steps: int = 3) -> Path:
    folder.mkdir()
    records = [{"step": step} | fields for step in range(1, steps + 1)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_a_run_is_read_from_its_folder_or_its_file(tmp_path):
    run = make_run(tmp_path / "run", SFT)
    curves = plot.read_run(str(run))
    assert curves == {"loss": ([1, 2, 3], [1.5] * 3), "grad_norm": ([1, 2, 3], [2.0] * 3)}
    assert plot.read_run(str(run / "metrics.jsonl")) == curves


def test_a_run_that_goes_on_is_read_to_its_last_whole_line(tmp_path):
    path = make_run(tmp_path / "run", SFT) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 1.')
    assert plot.read_run(str(path))["loss"][0] == [1, 2, 3]


def test_a_field_that_begins_late_has_its_own_steps(tmp_path):
    path = make_run(tmp_path / "run", SFT) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 1.0, "reward": 0.5}\n')
    curves = plot.read_run(str(path))
    assert curves["reward"] == ([4], [0.5]) and curves["loss"][0] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "metrics.jsonl: no such file"),
        ("", "metrics.jsonl: no metrics to draw"),
        ('{"step": 1, "other": 3}\n', "metrics.jsonl: no metrics to draw"),
        ('{"question": "?"}\n', "metrics.jsonl: line 1: not a record"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        plot.read_run(str(path))


def test_panels_are_those_that_some_run_has(tmp_path):
    sft = plot.read_run(str(make_run(tmp_path / "sft", SFT)))
    grpo = plot.read_run(str(make_run(tmp_path / "grpo", GRPO)))
    assert plot.choose_panels([sft]) == ["loss", "grad_norm"]
    both = ["reward", "loss", "response_length", "entropy", "kl", "grad_norm"]
    assert plot.choose_panels([sft, grpo]) == both


def test_smoothing():
    assert plot.smooth([]) == []
    assert plot.smooth([1.0, 2.0, 6.0, 4.0, 0.0], reach=1) == [1.5, 3.0, 4.0, 10 / 3, 2.0]
    line = [float(i) for i in range(20)]
    assert plot.smooth(line)[5:-5] == pytest.approx(line[5:-5])  # nothing lags behind
    assert plot.smooth([1.0, 0.0] * 20)[10] == pytest.approx(5 / 11)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not there
    run = make_run(tmp_path / "run", SFT)
    monkeypatch.setattr(sys, "argv", ["tools/plot.py", str(run)])
    with pytest.raises(SystemExit) as caught:
        plot.run_command(plot.main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error == "plot.py: error: matplotlib is missing: pip install matplotlib\n"


def test_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / "sft", SFT), make_run(tmp_path / "grpo", GRPO, steps=40)]
    for count in (1, 2):
        out = tmp_path / f"{count}.png"
        plot.main([*map(str, runs[:count]), "--out", str(out)])
        assert capsys.readouterr().out == f"{out}\n"
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_what_a_step_has_not_measured_is_left_out(tmp_path):
    path = make_run(tmp_path / "run", GRPO) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "reward": 1.0, "entropy": null}\n')
    curves = plot.read_run(str(path))
    assert curves["reward"][0] == [1, 2, 3, 4] and curves["entropy"][0] == [1, 2, 3]


def test_several_runs_can_be_typed():
    options = parse_options(plot.PlotOptions, ["a", "b", "--out", "c.png"])
    assert options.runs == ["a", "b"] and options.out == "c.png"
