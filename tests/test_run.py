"""The run folder's rules, resuming, signals, divergence, disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from hub.errors import InputError
from hub.weights import SIDE_FILES, weight_files
from model import Qwen2_5_VL
from training.journal import checksum
from training.optimizer import load_for_training, make_optimizer, optimizer_step
from training.run import Run, TrainOptions

# --- The run folder ---


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
    """A model that has been through `steps` updates on noise, its optimiser, and its run."""

    def make(steps: int = 1, **changes):
        o = options(**changes)
        model, run = load_for_training(o), begun(o)
        optimizer = make_optimizer(model, o)
        for _ in range(steps):
            update(model, optimizer, run)
        return model, optimizer, run

    return make


def begun(o: TrainOptions) -> Run:
    run = Run(o)
    run.begin()
    return run


def update(model, optimizer, run) -> None:
    torch.manual_seed(run.step)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer_step(model, optimizer, 1e-3, 1.0)
    run.step += 1
    run.log("metrics.jsonl", {"step": run.step})


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def steps_logged(o: TrainOptions, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (Path(o.out) / name).read_text().splitlines()]


def test_new_run_writes_its_options(options):
    o = options(learning_rate=3e-4)
    begun(o)
    config = json.loads((Path(o.out) / "config.json").read_text())
    assert (
        config["options"]["learning_rate"] == 3e-4
        and config["options"].keys() == TrainOptions.__dataclass_fields__.keys()
    )
    assert config["torch"] == torch.__version__ and "commit" in config and "python" in config


def test_until_it_begins_a_run_touches_no_disk(options, trained):
    o = options()
    Run(o)
    assert not Path(o.out).exists()
    model, optimizer, run = trained(2)
    run.save(model, optimizer, last=True)
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
    o = options(model=str(source))
    run, model = begun(o), load_for_training(o)
    shutil.rmtree(source)
    run.save(model, make_optimizer(model, o), last=True)
    saved = {p.name: p.read_bytes() for p in (run.folder / "model").iterdir()}
    assert saved.keys() == {*side_files, "config.json", "model.safetensors"}
    assert all(saved[name] == content for name, content in side_files.items())
    assert same(Qwen2_5_VL.from_pretrained(run.folder / "model"), model)


def test_a_model_folder_that_was_moved_away_is_made_whole_on_resume(options, trained, tmp_path):
    model, optimizer, run = trained(1)
    run.save(model, optimizer, last=True)
    shutil.move(run.folder / "model", tmp_path / "elsewhere")
    again = begun(options(resume=True))
    again.save(model, optimizer, last=True)
    names = {p.name for p in (tmp_path / "elsewhere").iterdir()}
    assert {p.name for p in (again.folder / "model").iterdir()} == names


def test_a_run_is_not_overwritten_unasked(options, trained):
    o = options()
    model, optimizer, run = trained(2)
    run.log("samples.jsonl", {"step": 1})
    run.save_checkpoint(model, optimizer)
    with pytest.raises(
        InputError, match="holds a run: use --resume, --overwrite, or another --out"
    ):
        Run(o)
    assert steps_logged(o) == [1, 2]  # and nothing of it is lost


def test_nor_is_one_whose_only_checkpoint_is_the_old_one(options, trained):
    """A crash came between the two renames of a replacement."""
    model, optimizer, run = trained(1)
    run.save_checkpoint(model, optimizer)
    (run.folder / "checkpoint").rename(run.folder / "checkpoint.old")
    with pytest.raises(InputError, match="holds a run: use --resume"):
        Run(options())


def test_a_run_without_a_checkpoint_starts_again(options, trained):
    trained(2)
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
    for name in ("metrics.jsonl", "model"):
        folder = tmp_path / name.split(".")[0]
        (folder / name).mkdir(parents=True)
        with pytest.raises(InputError, match="holds something that is no run"):
            Run(TrainOptions(out=str(folder)))
        assert (folder / name).is_dir()


def test_changed_data_cannot_be_resumed(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("1")
    options = TrainOptions(out=str(tmp_path / "run"), data=str(data))
    begun(options)
    data.write_text("2")
    with pytest.raises(InputError, match="d.jsonl changed since"):
        Run(replace(options, resume=True))


def test_another_starting_model_cannot_be_resumed(options, trained, tmp_path):
    """Its weights are the reference of the KL penalty."""
    source = tiny.make_folder(tmp_path / "source", "vl_tied", shards=2)
    model, optimizer, run = trained(1, model=str(source))
    run.save_checkpoint(model, optimizer)
    checksums = json.loads((run.folder / "config.json").read_text())["crc32"]
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
    model, optimizer, run = trained(2)
    run.log("samples.jsonl", {"step": 1})
    run.save(model, optimizer, last=True)
    (run.folder / "checkpoint.old").mkdir()  # a crash left it behind
    o = options(overwrite=True, seed=5)
    begun(o)
    assert sorted(p.name for p in Path(o.out).iterdir()) == ["config.json", "model"]
    assert not (run.folder / "model" / "model.safetensors").exists()
    assert json.loads((Path(o.out) / "config.json").read_text())["options"]["seed"] == 5


def test_resume_restores_weights_optimiser_and_step_and_truncates_metrics(options, trained):
    o = options()
    model, optimizer, run = trained(2)
    run.log("samples.jsonl", {"step": 1}, {"step": 2})
    run.save(model, optimizer, last=True)
    update(model, optimizer, run)  # step 3 is in the metrics, not in the checkpoint
    run.log("samples.jsonl", {"step": 3})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the crash came in the middle of a line
    again = options(resume=True, save_every=7, pack_tokens=1)
    model2, run2 = load_for_training(again), begun(again)
    optimizer2 = make_optimizer(model2, again)
    assert not same(model, model2)
    run2.load_checkpoint(model2, optimizer2)
    assert (
        run2.step == 2 and steps_logged(o) == [1, 2] and steps_logged(o, "samples.jsonl") == [1, 2]
    )
    update(model2, optimizer2, run2)
    assert same(model, model2)  # the third step again, bit for bit: Adam's moments are back too
    assert steps_logged(o) == [1, 2, 3]


def test_resume_refuses_what_it_cannot_go_on_from(options, trained):
    with pytest.raises(InputError, match="config.json"):  # no run at all
        Run(options(resume=True))
    model, optimizer, run = trained(1)
    with pytest.raises(InputError, match="there is no checkpoint to resume from"):
        Run(options(resume=True))
    run.save_checkpoint(model, optimizer)
    with pytest.raises(
        InputError,
        match="cannot resume with other options: --learning-rate was 1e-05; --seed was 0$",
    ):
        Run(options(resume=True, learning_rate=2e-5, seed=1))
    assert Run(options(resume=True)).step == 1


@pytest.mark.parametrize("crash", [1, 2])
def test_crash_while_the_checkpoint_is_replaced(options, trained, monkeypatch, crash):
    """Of the two renames the first or the second does not happen: the former checkpoint must
    still be found."""
    model, optimizer, run = trained(1)
    run.save_checkpoint(model, optimizer)
    update(model, optimizer, run)
    rename, count = Path.rename, iter(range(1, 10))

    def fail(self, target):
        if next(count) == crash:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(model, optimizer)
    monkeypatch.setattr(Path, "rename", rename)
    assert (run.folder / "checkpoint").exists() == (crash == 1) and (
        run.folder / "checkpoint.old"
    ).exists() == (crash == 2)
    again = options(resume=True)
    model, run = load_for_training(again), Run(again)
    optimizer = make_optimizer(model, again)
    run.load_checkpoint(model, optimizer)
    assert run.step == 1
    # the next replacement must not throw the only checkpoint away before the new one is in place
    update(model, optimizer, run)
    monkeypatch.setattr(
        Path, "rename", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(model, optimizer)
    monkeypatch.setattr(Path, "rename", rename)
    assert Run(again).step == 1
    run.save_checkpoint(model, optimizer)
    assert (
        Run(again).step == 2
        and not (run.folder / "checkpoint.old").exists()
        and not (run.folder / "checkpoint.tmp").exists()
    )


def test_half_written_checkpoint_is_not_taken_for_one(options, trained, monkeypatch):
    model, optimizer, run = trained(1)
    run.save_checkpoint(model, optimizer)
    update(model, optimizer, run)
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        run.save_checkpoint(model, optimizer)
    assert Run(options(resume=True)).step == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999, None])
def test_a_cut_checkpoint_is_called_damaged(options, trained, name, share):
    model, optimizer, run = trained(1)
    run.save_checkpoint(model, optimizer)
    path = run.folder / "checkpoint" / name
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="checkpoint: damaged"):
        Run(options(resume=True)).load_checkpoint(model, optimizer)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_too_little_memory_is_not_called_damage(options, trained, monkeypatch, error):
    def full(state):
        raise error

    model, optimizer, run = trained(1)
    run.save_checkpoint(model, optimizer)
    run = Run(options(resume=True))
    for loads in (model, optimizer):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(loads, "load_state_dict", full)
            run.load_checkpoint(model, optimizer)
    run.load_checkpoint(model, optimizer)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(options, trained):
    model, optimizer, run = trained(0, save_every=2)
    saved = []
    for step in range(1, 6):
        update(model, optimizer, run)
        run.save(model, optimizer, last=step == 5)
        state = run.folder / "checkpoint" / "state.json"
        saved.append(json.loads(state.read_text())["step"] if state.exists() else 0)
    assert saved == [0, 2, 2, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_keeps_dtype_and_side_files_and_loads(options, folder, tmp_path, dtype):
    source = tiny.make_folder(tmp_path / "source", "vl_tied")
    Qwen2_5_VL.from_pretrained(folder).save_pretrained(source, dtype=dtype)
    (source / "notes.txt").write_text("not part of a model")
    o = options(model=str(source))
    model = load_for_training(o)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    run = begun(o)
    run.save(model, make_optimizer(model, o), last=True)
    saved = run.folder / "model"
    assert {p.name for p in saved.iterdir()} == {p.name for p in source.iterdir()} - {"notes.txt"}
    for name in {p.name for p in source.iterdir()} & set(SIDE_FILES):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    weights, before = (
        load_file(saved / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    assert weights.keys() == before.keys() and "lm_head.weight" not in weights
    assert all(
        weights[name].dtype == dtype and torch.equal(weights[name], before[name]) for name in before
    )
    assert Qwen2_5_VL.from_pretrained(saved).config == Qwen2_5_VL.from_pretrained(source).config
