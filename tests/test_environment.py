"""What surrounds a command: closed or full streams, encodings, environment variables, links."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from hub import ranks
from hub.errors import InputError
from hub.options import ROOT
from kernels.triton_or_none import WrongKernels, wanted_kernels
from training.record_file import RecordFile, out_file

# A command that reads a line and prints it a number of times.
ECHO = """
import sys
sys.path.insert(0, {root!r})
from hub.errors import InputError
from hub.options import run_command

def main(argv):
    line = sys.stdin.readline()
    for _ in range(int(argv[0])):
        print(argv[1].replace("ZH", chr(0x4E2D)), line.strip())
    if argv[2:]:
        raise InputError(argv[2])

run_command(main)
"""


def echo(tmp_path: Path, arguments: str, **variables) -> subprocess.CompletedProcess:
    """Runs the command by a shell, with what else the shell shall do."""
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(root=str(ROOT)))
    line = f"{sys.executable} {script} {arguments}"
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"} | variables
    stdin, redirection = (None, "") if "<" in arguments else (subprocess.DEVNULL, "</dev/null")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {redirection}"],
        capture_output=True,
        env=environment,
        stdin=stdin,
        cwd=tmp_path,
        timeout=100,
    )


STREAMS = {  # arguments and redirections -> exit code, what is on stdout, on stderr
    "as usual": ("2 a", 0, b"a \na \n", b""),
    "stdin closed": ("1 a <&-", 0, b"a \n", b""),
    "stdout closed": ("1 a >&-", 0, b"", b""),
    "stderr closed": ("1 a 2>&-", 0, b"a \n", b""),
    "all closed": ("1 a <&- >&- 2>&-", 0, b"", b""),
    "a complaint to a closed stderr": ("1 a wrong 2>&-", 2, b"a \n", b""),
    "a complaint beside a closed stdout": ("1 a wrong >&-", 2, b"", b"echo.py: error: wrong\n"),
    "disk full": (
        "1 a >/dev/full",
        2,
        b"",
        b"echo.py: error: [Errno 28] No space left on device\n",
    ),
    "disk full while printing": (
        "9999 a >/dev/full",
        2,
        b"",
        b"echo.py: error: [Errno 28] No space left on device\n",
    ),
    "disk full, a complaint": ("1 a wrong 2>/dev/full", 2, b"a \n", b""),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_are_closed_or_full(tmp_path, name):
    arguments, code, out, err = STREAMS[name]
    done = echo(tmp_path, arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("count", [1, 99999])
@pytest.mark.parametrize("reader", ["head -n 1 >/dev/null", "true"])
def test_a_reader_that_leaves(tmp_path, count, reader):
    """It depends on the moment whether little output is noticed to go nowhere; much is."""
    for pipe in ("|", "2>&1 |"):
        done = echo(tmp_path, f"{count} a wrong {pipe} {reader} #")
        assert done.returncode in ((1, 2) if count == 1 else (1,))
        assert done.stderr in (b"", b"echo.py: error: wrong\n")


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"\\u4e2d\\xe9 \n"),
        ("latin-1", b"\\u4e2d\xe9 \n"),
        ("utf-8", "中é \n".encode()),
        ("ascii:replace", b"?? \n"),  # whoever asks for something gets it
    ],
)
def test_characters_that_the_output_lacks(tmp_path, encoding, printed):
    done = echo(tmp_path, "1 中é", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")
    done = echo(tmp_path, "0 a 中é", PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_a_locale_without_encoding(tmp_path, utf8):
    """Python then takes ASCII, or UTF-8 after all."""
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
    done = echo(tmp_path, "1 ZH", **variables)
    printed = "中 \n".encode() if utf8 == "1" else b"\\u4e2d \n"
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


# --- Environment variables ---


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": " 8 ", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"WORLD_SIZE": "8"}, (0, 8, 0)),
        ({"RANK": "one"}, "RANK must be a whole number, not 'one'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be a whole number, not '2.0'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE must be a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number, not '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, not 0"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    ],
)
def test_ranks(monkeypatch, variables, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)

    def numbers():
        return ranks.rank(), ranks.world_size(), ranks.local_rank()

    if isinstance(found, tuple):
        assert numbers() == found
    else:
        with pytest.raises(InputError, match=found):
            numbers()


@pytest.mark.parametrize(
    "variables", [{"RANK": "a"}, {"WORLD_SIZE": "many"}, {"RANK": "4", "WORLD_SIZE": "4"}]
)
def test_odd_ranks_are_one_line(tmp_path, variables):
    done = echo(tmp_path, "1 a", **variables)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"echo.py: error: the environment variable ")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "MASTER_ADDR expected, but not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "'abc'"),
    ],
)
def test_processes_that_torchrun_has_not_started_are_one_line(tmp_path, variables, reason):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")}
    tiny.make_folder(tmp_path / "m", "vl_tied")
    (tmp_path / "d.jsonl").write_text('{"question": "?", "answer": "1", "response": "1"}\n')
    done = subprocess.run(
        [sys.executable, ROOT / "sft.py", "--model", "m", "--data", "d.jsonl", "--out", "run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
        env=environment | {"WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": "1"} | variables,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert reason in done.stderr and "start them with torchrun, or unset WORLD_SIZE" in done.stderr
    assert not (tmp_path / "run").exists()


def test_kernels(monkeypatch):
    monkeypatch.delenv("KERNELS", raising=False)
    assert wanted_kernels() == "auto"
    for text, wanted in (("", "auto"), ("auto", "auto"), ("reference", "reference")):
        monkeypatch.setenv("KERNELS", text)
        assert wanted_kernels() == wanted
    for text in ("flash", "SDPA", " sdpa", "0"):
        monkeypatch.setenv("KERNELS", text)
        with pytest.raises(WrongKernels, match="KERNELS must be auto, triton, sdpa or reference"):
            wanted_kernels()


# --- An --out file that is a link ---


def record_file(path: Path, data: Path, **changes) -> RecordFile:
    options = {"resume": False, "overwrite": False} | changes
    return RecordFile(path, options, [data], keys=("id",), size=1)


@pytest.mark.parametrize("target", ["there.jsonl", "elsewhere/there.jsonl"])
def test_records_are_written_to_where_a_link_points(tmp_path, target):
    """Also in another folder; and --resume and --overwrite find them by the link."""
    data, link, real = tmp_path / "data", tmp_path / "link.jsonl", tmp_path / target
    data.write_text("1")
    real.parent.mkdir(exist_ok=True)
    link.symlink_to(real)
    file = record_file(link, data)
    file.append([{"id": "a"}])
    assert record_file(link, data, resume=True).groups == {("a",): [{"id": "a"}]}
    assert link.is_symlink() and json.loads(real.read_text()) == {"id": "a"}
    with pytest.raises(InputError, match="holds results"):
        record_file(link, data)
    record_file(link, data, overwrite=True)
    assert link.is_symlink() and not real.exists()


def test_a_link_to_somebody_elses_file_is_left_alone(tmp_path):
    (tmp_path / "data").write_text("1")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to("theirs")
    with pytest.raises(InputError, match="theirs is there, and no such command has written it"):
        record_file(tmp_path / "link", tmp_path / "data", overwrite=True)
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_folder_is_no_out_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (tmp_path, tmp_path / "link", "/", "."):
        with pytest.raises(InputError, match=f"--out {name} is a folder, not a file"):
            out_file(name)
