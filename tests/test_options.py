"""Options from dataclasses, errors as one line, and the choice of device, dtype and threads."""

import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from hub import device as device_module
from hub import options
from hub.config import Config
from hub.errors import InputError
from hub.options import ROOT, option, parse_options


@dataclass
class Options:
    """For these tests."""

    rate: float = option(0.5, "a rate", low=0.0, high=1.0)
    big_number: int = option(3, "a number", low=1)
    limit: int | None = option(None, "a limit", low=2)
    switch: bool = option(True, "a switch")
    kind: str = option("a", "a kind", choices=("a", "b"))
    files: list[str] = option(["x", "y"], "files")
    name: str | None = option(None, "a name")


RECIPES = {"micro": {}, "large": {"big_number": 100, "limit": None, "switch": False, "rate": 0.25}}


def test_typed_options_beat_the_recipe_and_the_recipe_the_defaults():
    assert parse_options(Options, []) == Options(0.5, 3, None, True, "a", ["x", "y"], None)
    assert parse_options(Options, [], RECIPES) == Options()
    assert parse_options(Options, ["--recipe", "large"], RECIPES) == Options(
        rate=0.25, big_number=100, switch=False
    )
    found = parse_options(Options, ["--big-number", "7", "--recipe", "large", "--switch"], RECIPES)
    assert found == Options(rate=0.25, big_number=7, switch=True)
    assert (
        parse_options(Options, ["--big-number", "3", "--recipe", "large"], RECIPES).big_number == 3
    )  # typed, though the default


def test_option_kinds():
    found = parse_options(
        Options,
        [
            "--no-switch",
            "--limit",
            "5",
            "--files",
            "p",
            "q",
            "r",
            "--kind",
            "b",
            "--name=n",
            "--rate",
            "1e-2",
        ],
    )
    assert found == Options(0.01, 3, 5, False, "b", ["p", "q", "r"], "n")
    assert parse_options(Options, ["--limit", "None"]).limit is None
    parse_options(Options, []).files.append("z")
    assert parse_options(Options, []).files == ["x", "y"]  # a default list is nobody's to change


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--unknown", "1"], "unrecognized arguments: --unknown"),
        (["stray"], "unrecognized arguments: stray"),
        (
            ["--big", "4"],
            "unrecognized arguments: --big",
        ),  # no abbreviations: a typo must not become another option
        (["--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--big-number", "1.5"], "invalid int value: '1.5'"),
        (["--limit", "none"], "argument --limit: invalid int value"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--rate"], "argument --rate: expected one argument"),
        (["--files"], "argument --files: expected at least one argument"),
        (["--rate", "1.5"], "--rate must be between 0.0 and 1.0, not 1.5"),
        (["--rate", "nan"], "--rate must be"),
        (["--rate", "inf"], "--rate must be"),
        (["--big-number", "0"], "--big-number must be at least 1, not 0"),
        (["--limit", "1"], "--limit must be at least 2, not 1"),
        (["--recipe", "huge"], "argument --recipe: invalid choice: 'huge'"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, message):
    with pytest.raises(InputError) as caught:
        parse_options(Options, argv, RECIPES)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("command, name", [("sft", "SFTOptions"), ("grpo", "GRPOOptions")])
def test_every_recipe_is_valid_and_help_explains_every_option(command, name, capsys):
    module = importlib.import_module(command)
    cls, recipes = getattr(module, name), module.RECIPES
    for recipe in recipes:
        parse_options(cls, ["--recipe", recipe], recipes)
    with pytest.raises(SystemExit) as caught:
        parse_options(cls, ["--help"], recipes)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{field.replace('_', '-')}" in text for field in cls.__dataclass_fields__)
    assert "{k1,k2,k3}" in text or command == "sft"


def test_commands_turn_errors_into_one_line_and_exit_code_2(tmp_path):
    missing = str(tmp_path / "none")
    command = [sys.executable, str(ROOT / "sft.py"), "--model", missing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sft.py: error: ") and missing in done.stderr
    assert done.stderr.count("\n") == 1


def test_run_command_passes_other_errors_on(monkeypatch, capsys):
    def fails(error):
        def main(argv):
            raise error

        return main

    for error in (InputError("two\n  lines"), PermissionError(13, "Permission denied", "out")):
        with pytest.raises(SystemExit) as caught:
            options.run_command(fails(error))
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        options.run_command(fails(ZeroDivisionError()))


def test_devices():
    assert device_module.pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="--device must be auto, cpu, cuda or mps, not abacus"):
        device_module.pick_device("abacus")
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="--device mps: "):
            device_module.pick_device("mps")


def test_auto_never_picks_what_is_untested(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_module.pick_device("auto").type == "cpu"


def test_ctrl_c_is_exit_code_130():
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        options.run_command(main)
    assert caught.value.code == 130


def test_a_positional_option_is_typed_without_its_name():
    @dataclass
    class FileOptions:
        file: str = option("", "a file", positional=True)
        limit: int = option(3, "a number")

    assert parse_options(FileOptions, ["a.txt", "--limit", "4"]) == FileOptions("a.txt", 4)
    with pytest.raises(InputError, match="the following arguments are required: FILE"):
        parse_options(FileOptions, [])


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_auto_is_bfloat16_on_a_cpu_only_where_it_has_instructions(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    found = device_module.pick_dtype("auto", CPU, "bfloat16")
    assert found == (torch.bfloat16 if avx512 or amx else torch.float32)
    assert device_module.pick_dtype("auto", CPU, "float32") == torch.float32
    assert device_module.pick_dtype("auto", CPU, "float16") == torch.float32


def test_a_torch_that_cannot_tell_counts_as_no_instructions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert device_module.pick_dtype("auto", CPU, "bfloat16") == torch.float32


def test_auto_is_the_dtype_on_disk_on_a_gpu():
    for name in ("float32", "float16", "bfloat16"):
        assert device_module.pick_dtype("auto", GPU, name) == getattr(torch, name)


def test_auto_is_float32_on_apples_gpus():
    for name in ("float32", "float16", "bfloat16"):
        assert device_module.pick_dtype("auto", torch.device("mps"), name) == torch.float32


def test_a_typed_dtype_decides():
    for device in (CPU, GPU):
        assert device_module.pick_dtype("float32", device, "bfloat16") == torch.float32
        assert device_module.pick_dtype("bfloat16", device, "float32") == torch.bfloat16


def test_small_models_use_one_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    sizes = dict.fromkeys(Config.__dataclass_fields__, 1)
    device_module.limit_threads(Config(**sizes | {"hidden_size": 2048}))
    assert asked == []
    device_module.limit_threads(Config(**sizes | {"hidden_size": 128}))
    assert asked == [1]


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.23 GiB is free. Including non-PyTorch memory, this process has 77.86 GiB memory in "
    "use. Of the allocated memory 76.00 GiB is allocated by PyTorch, and 800.00 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


@pytest.mark.parametrize(
    "error, shortage",
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            ": 2.00 GiB were asked for, 1.23 GiB of the 79.10 GiB of GPU 0 are free",
        ),
        (
            RuntimeError(
                "MPS backend out of memory (MPS allocated: 8.99 GB, other allocations: 1.00 GB, "
                "max allowed: 20.13 GB). Tried to allocate 256 bytes on private pool."
            ),
            ": 256 bytes were asked for",
        ),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), ""),
    ],
)
def test_out_of_memory_is_one_line(error, shortage):
    """It says in which phase, how much was asked for, what the card has, and what would help."""
    with pytest.raises(InputError) as caught:
        with device_module.memory_phase("the rollout", "a lower --max-batch", "a smaller model"):
            raise error
    wanted = f"out of memory in the rollout{shortage}; what helps: a lower --max-batch, a smaller"
    assert str(caught.value) == f"{wanted} model"


def test_other_errors_pass_through_a_memory_phase():
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            with device_module.memory_phase("the rollout", "nothing"):
                raise error
    assert not issubclass(InputError, RuntimeError)
