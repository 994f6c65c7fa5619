"""--out files: what survives kill -9 and a full disk, what may differ on --resume, and refusals."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hub.errors import InputError
from training.journal import checksum, read_records
from training.record_file import RecordFile, check_unused, when_all_are_there

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"resume": False, "overwrite": False, "out": "o", "max_batch": 8, "seed": 0, "model": "m"}


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("1\n")
    return path


@pytest.fixture
def begin(tmp_path, data):
    """Opens out.jsonl, with two records to a question."""

    def open_file(**changes) -> RecordFile:
        options = OPTIONS | changes
        return RecordFile(tmp_path / "out.jsonl", options, [data], keys=("file", "id"), size=2)

    return open_file


def group(name: str) -> list[dict]:
    return [{"file": "f", "id": name, "run": run, "text": "é\u2028\n" + name} for run in range(2)]


def lines(file: RecordFile) -> list[tuple[str, int]]:
    records = map(json.loads, file.path.read_bytes().splitlines())
    return [(record["id"], record["run"]) for record in records]


# --- What is kept ---


def test_groups_are_there_at_once_and_in_order_at_the_end(begin):
    file = begin()
    for name in "bca":
        file.append(group(name))
        assert lines(file)[-2:] == [(name, 0), (name, 1)]
    file.finish([("f", name) for name in "abc"])
    assert lines(file) == [(name, run) for name in "abc" for run in range(2)]
    again = begin(resume=True)
    assert again.groups == {("f", name): group(name) for name in "abc"} and lines(again) == lines(
        file
    )


@pytest.mark.parametrize("lost", [1, 10, "record", "record and 1"])
def test_what_is_not_whole_is_dropped(begin, lost):
    """A last line that was cut, and a group of which one record is missing."""
    file = begin()
    for name in "abc":
        file.append(group(name))
    content = file.path.read_bytes()
    record = len(content.splitlines(keepends=True)[-1])
    lost = {"record": record, "record and 1": record + 1}.get(lost, lost)
    file.path.write_bytes(content[:-lost])
    again = begin(resume=True)
    assert list(again.groups) == [("f", "a"), ("f", "b")] and lines(again)[-1] == ("b", 1)
    again.append(group("c"))
    assert again.path.read_bytes() == content


WRITER = """
import sys
from training.record_file import RecordFile
options = {"resume": False, "overwrite": False}
file = RecordFile(sys.argv[1], options, [], keys=("id",), size=2)
for i in range(10**9):
    file.append([{"id": i, "text": "x" * 10_000}] * 2)
    print(i, flush=True)
"""


def start_writer(path: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def resumed(path: Path) -> RecordFile:
    return RecordFile(path, {"resume": True, "overwrite": False}, [], keys=("id",), size=2)


def test_kill_9_loses_no_group_that_was_appended(tmp_path):
    process = start_writer(tmp_path / "out.jsonl")
    for _ in range(20):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    for line in process.stdout:
        last = int(line)
    process.wait()
    file = resumed(tmp_path / "out.jsonl")
    whole = len(file.groups)
    assert whole in (last + 1, last + 2) and list(file.groups) == [(i,) for i in range(whole)]


def test_a_full_disk_loses_no_group_that_was_appended(tmp_path):
    limit = (105_000, 105_000)  # bytes: five groups and a half
    process = start_writer(
        tmp_path / "out.jsonl",
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    out, error = process.communicate(timeout=600)
    assert "File too large" in error and out.split() == list("01234")
    assert len(resumed(tmp_path / "out.jsonl").groups) == 5


def test_without_a_path_groups_are_kept_in_memory_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = RecordFile(None, OPTIONS, ["no such file"], keys=("file", "id"), size=2)
    file.append(group("a"))
    file.finish([("f", "a")])
    assert file.groups == {("f", "a"): group("a")} and not os.listdir(tmp_path)


# --- What may differ, and what is refused ---


def test_the_config_says_what_the_records_depend_on(begin, data):
    begin()
    config = json.loads((data.parent / "out.jsonl.config.json").read_text())
    assert config["options"] == OPTIONS and config["crc32"] == {str(data): checksum(data)}
    assert {"commit", "python", "torch"} <= config.keys()


def test_resume_with_the_same_options_and_inputs_only(begin, data):
    begin().append(group("a"))
    assert begin(resume=True, out="p", max_batch=1, overwrite=True).groups
    with pytest.raises(InputError) as caught:
        begin(resume=True, seed=3, model="n", max_batch=1)
    path = data.parent / "out.jsonl"
    wanted = f"{path}: cannot resume with other options: --seed was 0; --model was 'm'"
    assert str(caught.value) == wanted
    data.write_text("2\n")
    with pytest.raises(InputError, match="out.jsonl: cannot resume: .*data.jsonl changed since"):
        begin(resume=True)


def test_there_must_be_something_to_resume(begin):
    with pytest.raises(InputError, match="there is nothing to resume"):
        begin(resume=True)
    begin()  # was stopped before its first group
    assert begin(resume=True).groups == {}
    begin().append(group("a"))


def test_results_are_replaced_only_if_told_to(begin, data):
    begin().append(group("a"))
    with pytest.raises(InputError, match="holds results: use --resume, --overwrite, or another"):
        begin(seed=1)
    assert begin(resume=True).groups
    file = begin(overwrite=True, seed=1)
    assert not file.groups and not file.path.exists()
    with pytest.raises(InputError, match="data.jsonl is there, and no such command has written it"):
        check_unused(data, Path(f"{data}.config.json"), True)


@pytest.mark.parametrize("line", ["{", "3", "[]", "{}", '{"file": "f"}', "\xff"])
def test_a_foreign_line_is_named(begin, line):
    file = begin()
    file.append(group("a"))
    file.path.write_bytes(file.path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match="out.jsonl: line 3: not a record of this command"):
        begin(resume=True)


def test_records_are_read_with_the_offsets_of_their_ends(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 12}\n{"ste')
    found = [(record["step"], end) for record, end in read_records(path, ("step",))]
    assert found == [(1, 12), (12, 25)]


def test_completions_are_handed_on_once_all_of_a_prompt_are_there():
    seen = []
    on_completion = when_all_are_there(2, lambda prompt, group: seen.append((prompt, group)))
    for prompt, sample in ((0, 1), (1, 0), (1, 1), (0, 0)):
        on_completion(prompt, sample, f"{prompt}.{sample}")
    assert seen == [(1, ["1.0", "1.1"]), (0, ["0.0", "0.1"])]
