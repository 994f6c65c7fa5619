"""The run folder's rules, exact resume, the loop over the steps, signals, room on the disk."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from hub.errors import InputError
from hub.weights import SIDE_FILES, weight_files
from model import Qwen2_5_VL
from training import run as run_module
from training.journal import checksum
from training.optimizer import load_for_training, make_optimizer, optimizer_step
from training.options import TrainOptions
from training.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl_tied")


@pytest.fixture
def options(folder, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("1")

    def make(**changes) -> TrainOptions:
        defaults = {"model": str(folder), "data": str(data), "out": str(tmp_path / "run")}
        return TrainOptions(**{**defaults, "device": "cpu", **changes})

    return make


@pytest.fixture
def trained(options):
    """Makes a run that has been through so many updates on noise, and is not saved."""

    def make(steps: int = 1, **changes) -> Run:
        run = begun(options(**changes))
        for _ in range(steps):
            update(run)
        return run

    return make


def begun(o: TrainOptions, **changes) -> Run:
    return begin(Run(o), **changes)


def begin(run: Run, **changes) -> Run:
    model = load_for_training(run.options)
    run.begin(model, make_optimizer(model, run.options), **changes)
    return run


def snapshot(folder: Path) -> dict:
    """What every file of a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def update(run: Run) -> None:
    torch.manual_seed(run.step)
    for p in run.model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer_step(run.model, run.optimizer, 1e-3, 1.0)
    run.step += 1
    run.log("metrics.jsonl", {"step": run.step})


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def steps_logged(o: TrainOptions, name: str = "metrics.jsonl") -> list[int]:
    return [record["step"] for record in records(Path(o.out) / name)]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(o: TrainOptions) -> dict:
    return json.loads((Path(o.out) / "config.json").read_text())


# --- A new run ---


def test_new_run_writes_its_options(options):
    o = options(learning_rate=3e-4)
    begun(o, warmup_steps=7)
    config = config_of(o)
    assert config["options"]["learning_rate"] == 3e-4
    assert config["options"].keys() == TrainOptions.__dataclass_fields__.keys()
    assert config["torch"] == torch.__version__ and "commit" in config and "python" in config
    assert config["processes"] == 1 and config["warmup_steps"] == 7 and "resumed" not in config


def test_until_it_begins_a_run_touches_no_disk(options, trained):
    o = options()
    Run(o)
    assert not Path(o.out).exists()
    run = trained(2)
    run.save()
    run.log("metrics.jsonl", {"step": 3})  # behind the checkpoint

    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in Path(o.out).rglob("*") if p.is_file()}

    before = contents()
    Run(options(overwrite=True))
    Run(options(resume=True))
    assert contents() == before


def test_side_files_are_copied_at_the_beginning(options, folder, tmp_path):
    """So it does not matter what becomes of the folder that training started from."""
    source = shutil.copytree(folder, tmp_path / "source")
    side_files = {p.name: p.read_bytes() for p in source.iterdir() if p.name in SIDE_FILES}
    assert "tokenizer.json" in side_files
    run = begun(options(model=str(source)))
    shutil.rmtree(source)
    run.save()
    saved = {p.name: p.read_bytes() for p in (run.folder / "model").iterdir()}
    assert saved.keys() == {*side_files, "config.json", "model.safetensors"}
    assert all(saved[name] == content for name, content in side_files.items())
    assert same(Qwen2_5_VL.from_pretrained(run.folder / "model"), run.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_keeps_dtype_and_side_files_and_loads(options, folder, tmp_path, dtype):
    source = tiny.make_folder(tmp_path / "source", "vl_tied")
    Qwen2_5_VL.from_pretrained(folder).save_pretrained(source, dtype=dtype)
    (source / "notes.txt").write_text("not part of a model")
    run = begun(options(model=str(source)))
    run.save()
    saved = run.folder / "model"
    assert {p.name for p in saved.iterdir()} == {p.name for p in source.iterdir()} - {"notes.txt"}
    for name in {p.name for p in source.iterdir()} & set(SIDE_FILES):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    weights = load_file(saved / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert weights.keys() == before.keys() and "lm_head.weight" not in weights
    for name, weight in before.items():
        assert weights[name].dtype == dtype and torch.equal(weights[name], weight)
    assert Qwen2_5_VL.from_pretrained(saved).config == Qwen2_5_VL.from_pretrained(source).config


# --- What is refused, what is replaced ---


def test_a_run_is_not_overwritten_unasked(options, trained):
    run = trained(2)
    run.log("samples.jsonl", {"step": 1})
    run.save()
    with pytest.raises(
        InputError, match="holds a run: use --resume, --overwrite, or another --out"
    ):
        Run(options())
    assert steps_logged(options()) == [1, 2]  # and nothing of it is lost


def test_a_run_without_a_checkpoint_starts_again(options, trained):
    run = trained(2)
    (run.folder / "checkpoint" / "step-000002.tmp").mkdir(parents=True)  # killed while saving
    assert Run(options()).step == 0


@pytest.mark.parametrize("out", ["", "m", "m/.."])
def test_a_model_folder_is_no_run_folder(options, folder, tmp_path, monkeypatch, out):
    """Not even with --overwrite: neither the model that training starts from nor what holds it."""
    monkeypatch.chdir(tmp_path)
    tiny.make_folder(tmp_path / "m", "vl_tied")
    tiny.make_folder(tmp_path / "other", "vl_tied")
    before = sorted(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(InputError, match="--out"):
        Run(options(model="m", out=out, overwrite=True))
    with pytest.raises(InputError, match="other holds something that is no run"):
        Run(options(model="m", out="other", overwrite=True))
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    for name in ("metrics.jsonl", "model", "best"):
        folder = tmp_path / f"of-{name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(InputError, match="holds something that is no run"):
            Run(TrainOptions(out=str(folder)))
        assert (folder / name).is_dir()


@pytest.mark.parametrize("target", ["there", "yet/to/be/made"])
def test_a_run_folder_may_be_a_link(options, tmp_path, target):
    link, real = tmp_path / "link", tmp_path / target
    link.symlink_to(real)
    if target == "there":
        real.mkdir()
    begun(options(out=str(link))).save()
    assert link.is_symlink() and (real / "model" / "model.safetensors").exists()
    assert Run(options(out=str(link), resume=True)).step == 0
    with pytest.raises(InputError, match="holds a run"):
        Run(options(out=str(link)))


def test_a_run_folder_is_no_file(options, tmp_path):
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for out in ("file", "link", "file/run", "link/a/run"):
        with pytest.raises(InputError, match=f"--out .*{out}: .*/file is a file, not a folder"):
            Run(options(out=str(tmp_path / out)))
    with pytest.raises((InputError, OSError)):  # one line
        begun(options(out=str(tmp_path / "loop")))
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_link_to_the_starting_model_is_no_run_folder(options, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(InputError, match="holds the model that training starts from"):
        Run(options(out=str(tmp_path / "link"), overwrite=True))


def test_what_a_link_in_the_run_folder_points_to_is_not_replaced(options, trained, tmp_path):
    """--overwrite replaces the link: the folder may be another run's, or the starting model."""
    trained().save()
    kept = tmp_path / "kept"
    (tmp_path / "run" / "model").rename(kept)
    (tmp_path / "run" / "model").symlink_to(kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    trained(overwrite=True).save()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert not (tmp_path / "run" / "model").is_symlink()


def test_a_bad_environment_replaces_nothing(options, trained, tmp_path, monkeypatch):
    trained().save()
    monkeypatch.setenv("KERNELS", "flash")
    with pytest.raises(OSError, match="KERNELS must be"):
        begun(options(overwrite=True))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


# --- Two runs in one folder ---


HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["new", "overwrite", "resume"])
def test_a_folder_that_another_process_trains_in_is_left_as_it_is(options, trained, kind):
    """Until that process ends, be it by kill -9."""
    out = Path(options().out)
    if kind == "new":
        out.mkdir()
    else:
        trained(2).save()
        os.close(run_module.LOCKS.pop(out))  # as if that process had ended
    before = snapshot(out)
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        o = options() if kind == "new" else options(**{kind: True})
        with pytest.raises(InputError, match="run: another process is training in it"):
            begun(o)
        assert snapshot(out) == before
        holder.kill()
    begun(o)
    assert (out / "config.json").exists()


def test_what_another_process_has_done_meanwhile_is_not_replaced(options, trained):
    """Both have found the folder free or at one step; the other one was quicker, and has ended."""
    late = Run(options())
    quick = trained(1)
    quick.save()
    with pytest.raises(InputError, match="holds a run"):
        begin(late)
    late = Run(options(resume=True))
    update(quick)
    quick.save()
    before = snapshot(quick.folder)
    with pytest.raises(InputError, match="another process has gone on from step 1"):
        begin(late)
    assert snapshot(quick.folder) == before


def test_a_file_system_without_locks_is_no_obstacle(options, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_module.fcntl, "flock", no_locks)
    assert begun(options()).folder.exists()


@pytest.mark.parametrize("name", ["data", "model"])
def test_missing_inputs_are_named(options, tmp_path, name):
    missing = str(tmp_path / "nowhere")
    wanted = {
        "data": f"{missing}: cannot be read \\(No such file",
        "model": f"{missing}: no such folder",
    }
    with pytest.raises(InputError, match=wanted[name]):
        Run(options(**{name: missing}))


def test_overwrite_leaves_nothing_of_the_old_run(options, trained):
    run = trained(2)
    run.log("samples.jsonl", {"step": 1})
    run.save()
    (run.folder / "best").mkdir()
    (run.folder / "diverged.json").write_text("{}")
    o = options(overwrite=True, seed=5)
    begun(o)
    assert sorted(p.name for p in Path(o.out).iterdir()) == ["config.json", "model"]
    assert not (run.folder / "model" / "model.safetensors").exists()
    assert config_of(o)["options"]["seed"] == 5


# --- Resume ---


def test_resume_restores_weights_optimiser_and_step_and_truncates_metrics(options, trained):
    o = options()
    run = trained(2)
    run.log("samples.jsonl", {"step": 1}, {"step": 2})
    run.save()
    update(run)  # step 3 is in the metrics, not in the checkpoint
    run.log("samples.jsonl", {"step": 3})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the crash came in the middle of a line
    again = begun(options(resume=True, save_every=7, pack_tokens=1))
    assert not same(run.model, again.model)
    assert again.step == 2 and [record["step"] for record in again.records] == [1, 2]
    assert steps_logged(o) == [1, 2] and steps_logged(o, "samples.jsonl") == [1, 2]
    update(again)
    # The third step again, bit for bit: Adam's moments are back too.
    assert same(run.model, again.model)
    assert steps_logged(o) == [1, 2, 3]


def test_resume_refuses_what_it_cannot_go_on_from(options, trained):
    with pytest.raises(InputError, match="config.json"):  # no run at all
        Run(options(resume=True))
    run = trained(1)
    with pytest.raises(InputError, match="there is no checkpoint to resume from"):
        Run(options(resume=True))
    run.save()
    with pytest.raises(
        InputError,
        match="cannot resume with other options: --learning-rate was 1e-05; --seed was 0$",
    ):
        Run(options(resume=True, learning_rate=2e-5, seed=1))
    assert Run(options(resume=True)).step == 1


def test_a_damaged_checkpoint_leaves_the_folder_as_it_is(options, trained):
    run = trained(1)
    run.save()
    run.log("metrics.jsonl", {"step": 2})
    next((run.folder / "checkpoint").rglob("*.distcp")).write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        begun(options(resume=True))
    assert steps_logged(options()) == [1, 2] and "resumed" not in config_of(options())


def test_what_may_differ_is_written_down(options, trained):
    """A run that ran out of memory goes on with less, and one that has ended goes on for longer."""
    trained(1, max_steps=1).save()
    changes = {"max_steps": 9, "epochs": 5, "pack_tokens": 512, "keep": 2, "eval_every": 3}
    begun(options(**changes, resume=True), warmup_steps=8)
    begun(options(max_steps=1, resume=True), warmup_steps=9)
    config = config_of(options())
    first, second = config["resumed"]
    assert config["options"]["max_steps"] == 1 and config["warmup_steps"] == 0
    assert first["options"] == changes and second["options"] == {}
    assert first["step"] == 1 and first["processes"] == 1
    assert first["torch"] == torch.__version__ and "commit" in first


def test_changed_data_cannot_be_resumed(options, trained):
    trained(1).save()
    Path(options().data).write_text("2")
    with pytest.raises(InputError, match="d.jsonl changed since"):
        Run(options(resume=True))


def test_another_starting_model_cannot_be_resumed(options, trained, tmp_path):
    """Its weights are the reference of the KL penalty."""
    source = tiny.make_folder(tmp_path / "source", "vl_tied", shards=2)
    trained(1, model=str(source)).save()
    checksums = config_of(options())["crc32"]
    assert {p: checksums[str(p)] for p in weight_files(source)} == {
        p: checksum(p) for p in weight_files(source)
    }
    assert Run(options(model=str(source), resume=True)).step == 1
    shard = weight_files(source)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot resume: {shard} changed since"):
        Run(options(model=str(source), resume=True))


def test_a_starting_model_of_another_shape_cannot_be_resumed(options, trained, tmp_path):
    source = tiny.make_folder(tmp_path / "source")
    trained(1, model=str(source)).save()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    with pytest.raises(InputError, match="cannot resume: .*config.json changed since"):
        Run(options(model=str(source), resume=True))


def test_what_an_older_version_did_not_write_down_is_not_compared(options, trained):
    trained(1).save()
    path = Path(options().out) / "config.json"
    config = json.loads(path.read_text())
    config["crc32"] = {p: crc for p, crc in config["crc32"].items() if "tokenizer" not in p}
    path.write_text(json.dumps(config))
    assert Run(options(resume=True)).step == 1


def test_damage_behind_the_checkpoint_is_cut_off(options, trained):
    """As a file system may leave it after a power failure."""
    run = trained(2)
    run.save()
    metrics = run.folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + bytes(8) + b"\n" + b'{"step": 3}\n')
    begun(options(resume=True))
    assert metrics.read_bytes() == whole
    metrics.write_bytes(bytes(8) + b"\n" + whole)
    with pytest.raises(InputError, match="line 1: not a record"):
        begun(options(resume=True))


def test_gpus_are_for_the_plan_only(options):
    with pytest.raises(InputError, match="--gpus is for --plan"):
        Run(options(gpus=8))


def test_a_model_folder_that_was_moved_away_is_made_whole_on_resume(options, trained, tmp_path):
    run = trained(1)
    run.save()
    shutil.move(run.folder / "model", tmp_path / "elsewhere")
    again = begun(options(resume=True))
    again.step += 1
    again.save()
    names = {p.name for p in (tmp_path / "elsewhere").iterdir()}
    assert {p.name for p in (again.folder / "model").iterdir()} == names


# --- The loop over the steps ---


def take_steps(run: Run, num_items: int = 4, size: int = 2, before_step=lambda run: None) -> list:
    """Goes through the loop of a run without training anything. Returns the batches."""
    batches = []
    for epoch, chosen in run.steps(num_items, size):
        before_step(run)
        batches.append((epoch, chosen))
        run.finish_step({"loss": 1.0, "tokens": 10}, [{"step": run.step + 1}])
    return batches


def test_steps_are_counted_logged_and_saved(options, monkeypatch):
    saved, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run: (saved.append(run.step), save(run)))
    o = options(epochs=3, max_steps=5, save_every=2)
    run = begun(o)
    batches = take_steps(run)
    assert [epoch for epoch, _ in batches] == [0, 0, 1, 1, 2]
    assert sorted(batches[0][1] + batches[1][1]) == [0, 1, 2, 3]
    assert saved == [2, 4, 5]
    found = records(run.folder / "metrics.jsonl")
    assert found == run.records and [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert all(
        record["tokens_per_second"] * record["seconds"] == pytest.approx(10) for record in found
    )
    assert steps_logged(o, "samples.jsonl") == [1, 2, 3, 4, 5]
    assert run.postfix() == {"loss": "1.000", "tokens": "50.0"}


def test_at_the_end_only(options, monkeypatch):
    saved = []
    monkeypatch.setattr(Run, "save", lambda run: saved.append(run.step))
    take_steps(begun(options(epochs=2, save_every=0)))
    assert saved == [4]


def test_a_run_goes_on_for_longer_with_the_batches_of_an_uninterrupted_one(options, tmp_path):
    whole = take_steps(begun(options(epochs=4, out=str(tmp_path / "whole"))))
    first = take_steps(begun(options(epochs=2)))
    rest = take_steps(begun(options(epochs=4, resume=True)))
    assert first + rest == whole and len(rest) == 4
    assert steps_logged(options()) == list(range(1, 9))
    # Nothing is left to do.
    assert take_steps(begun(options(epochs=1, resume=True))) == []


def test_sigterm_ends_the_step_and_saves(options, capsys):
    def preempt(run: Run) -> None:
        if run.step == 1:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run = begun(options(epochs=3, save_every=0))
    with pytest.raises(SystemExit) as stopped:
        take_steps(run, before_step=preempt)
    assert stopped.value.code == 143
    said = "stopped by SIGTERM after step 2: --resume goes on from the last checkpoint"
    assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(take_steps(begun(options(epochs=3, resume=True)))) == 4


def test_without_checkpoints_sigterm_promises_no_resume(options, capsys):
    run = begun(options(epochs=3, keep=0))
    with pytest.raises(SystemExit):
        take_steps(run, before_step=lambda run: signal.raise_signal(signal.SIGTERM))
    assert "after step 1: there is no checkpoint to go on from" in capsys.readouterr().err


def test_resuming_a_finished_run_makes_its_model_again(options):
    take_steps(begun(options(max_steps=2)))
    path = Path(options().out) / "model" / "model.safetensors"
    weights = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(b"of a later step")):
        damage()
        assert take_steps(begun(options(max_steps=2, resume=True))) == []
        assert path.read_bytes() == weights


def test_sigterm_in_the_last_step_changes_nothing(options):
    run = begun(options(epochs=1))
    take_steps(run, num_items=2, before_step=lambda run: signal.raise_signal(signal.SIGTERM))
    assert Run(options(resume=True)).step == 1


def test_keep_0_writes_no_checkpoint_and_deletes_none(options):
    run = begun(options(save_every=1, keep=0, max_steps=2))
    take_steps(run)
    out = run.folder
    assert (out / "model" / "model.safetensors").exists() and not (out / "checkpoint").exists()
    with pytest.raises(InputError, match="holds a run"):  # its model would be lost
        Run(options())
    take_steps(begun(options(save_every=1, keep=2, max_steps=2, overwrite=True)))
    take_steps(begun(options(save_every=1, keep=0, max_steps=4, resume=True)))
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["step-000002"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_while_saving_is_one_line(options, monkeypatch, error):
    def full(*_):
        raise error

    run = begun(options(max_steps=1))
    monkeypatch.setattr(Run, "write", full)
    with pytest.raises(InputError, match="step 1 cannot be saved .*(No space|unexpected pos)"):
        take_steps(run)


def test_a_model_that_does_not_fit_on_the_disk_is_one_line(options):
    """A limit on the size of files stands for the disk; safetensors has an error of its own."""
    run = begun(options(max_steps=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match="step 1 cannot be saved .*File too large"):
            take_steps(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(run.folder.rglob("*.tmp"))


def test_a_bug_while_saving_is_no_full_disk(options, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes differ")

    run = begun(options(max_steps=1))
    monkeypatch.setattr(Run, "write", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        take_steps(run)


def test_ctrl_c_saves_nothing_and_gives_the_signal_back(options):
    def interrupt(run: Run) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        take_steps(begun(options()), before_step=interrupt)
    assert signal.getsignal(signal.SIGTERM) == before
    assert Run(options()).step == 0


# --- Disk ---

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_is_said_before_the_first_step(options, trained, monkeypatch):
    free = 10**12
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: Usage(0, 0, free))
    run = trained(1)
    run.save()
    sizes = {}
    for name in ("checkpoint", "model"):
        sizes[name] = sum(p.stat().st_size for p in (run.folder / name).rglob("*.*") if p.is_file())
    shutil.rmtree(run.folder)

    def fits(**changes) -> bool:
        try:
            begun(options(**changes))
        except InputError as error:
            assert "GB free" in str(error) and "--save-every 0" in str(error)
            assert not Path(options().out).exists()
            return False
        shutil.rmtree(options().out)
        return True

    # A little is left out of the estimate: the files' headers and the tokenizer.
    for changes, checkpoints, models in (
        ({}, 2, 2),
        ({"keep": 3}, 4, 2),
        ({"save_every": 0}, 1, 1),
        ({"eval_every": 1}, 2, 4),
    ):
        needed = checkpoints * sizes["checkpoint"] + models * sizes["model"]
        free = int(1.01 * needed)
        assert fits(**changes), changes
        free = int(0.5 * needed)
        assert not fits(**changes), changes


def test_with_keep_0_old_checkpoints_are_no_room(options, trained, monkeypatch):
    run = trained(1)
    run.save()
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    with pytest.raises(InputError, match="GB free"):
        begun(options(resume=True, keep=0))


def test_what_the_folder_holds_is_room(options, trained, monkeypatch):
    """On resume one more checkpoint and one more model, while they are written."""
    run = trained(1)
    run.save()
    held = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
    for free, fits in ((int(1.05 * held), True), (int(0.7 * held), False)):
        monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: Usage(0, 0, free))
        if fits:
            begun(options(resume=True))
        else:
            with pytest.raises(InputError, match="GB free"):
                begun(options(resume=True))
