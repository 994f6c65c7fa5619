"""Stage 1: the loss against transformers, its tokens, batches however split, and whole runs."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sft
import tiny
from data import InputError, Row, Tokenizer, make_pack, make_row
from hub.options import parse_options
from hub.weights import copy_side_files
from kill_nine import read_checkpoint
from model import Qwen2_5_VL
from training.optimizer import load_for_training

GOLDEN = Path(__file__).parent / "golden" / "model_sft.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five questions of different lengths with worked responses."""
    path = tmp_path_factory.mktemp("data") / "sft.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"q{i}",
                    "question": f"What is {i} + {i}?{' Think.' * i}",
                    "answer": str(2 * i),
                    "response": f"<think>{i} and {'and' * i} {i}</think><answer>{2 * i}</answer>",
                }
            )
            + "\n"
            for i in range(1, 6)
        )
    )
    return path


@pytest.fixture
def options(folder, data, tmp_path):
    """Makes options for a run in the test's own folder."""

    def make(**changes) -> sft.SFTOptions:
        return sft.SFTOptions(
            **{
                "model": str(folder),
                "data": str(data),
                "out": str(tmp_path / "run"),
                "device": "cpu",
                "batch_size": 2,
                "max_steps": None,
                **changes,
            }
        )

    return make


def metrics(o: sft.SFTOptions) -> list[dict]:
    return [json.loads(line) for line in (Path(o.out) / "metrics.jsonl").read_text().splitlines()]


def gradients(
    o: sft.SFTOptions, rows: list, monkeypatch, dtype=torch.float64
) -> tuple[dict[str, torch.Tensor], dict]:
    """The gradient that train_step hands to the optimiser, and its metrics."""
    model, out = load_for_training(o).to(dtype), {}

    def catch(model, *_):
        out.update(
            (name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None
        )
        return 0.0

    monkeypatch.setattr(sft, "optimizer_step", catch)
    return out, sft.train_step(model, None, rows, 1e-3, o)


@pytest.mark.parametrize("variant", ["vl", "vl_tied"])
def test_loss_and_gradients_equal_transformers(tmp_path, variant):
    golden = {
        k.removeprefix(f"{variant}/"): v
        for k, v in np.load(GOLDEN).items()
        if k.startswith(f"{variant}/")
    }
    model, case = Qwen2_5_VL.from_pretrained(tiny.make_folder(tmp_path, variant)), tiny.sft_case()
    rows = []
    for ids, labels, length in zip(case.input_ids, case.labels, case.lengths):
        rows.append(make_row(ids[:length].tolist(), (labels[:length] != -100).tolist()))
    pack = make_pack(rows)
    loss = sft.sft_loss(model, pack) / len(pack.targets)
    loss.backward()
    assert loss.item() == pytest.approx(float(golden.pop("loss")), rel=1e-5)
    ours = {
        f"grad/{name}": tiny.gradient_summary(p.grad).numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert ours.keys() == golden.keys() and len(golden) > 20
    for name, value in golden.items():  # norm, then 16 values
        assert ours[name][0] == pytest.approx(value[0], rel=1e-4), name
        assert np.abs(ours[name] - value).max() <= 1e-4 * np.abs(value).max(), name


@pytest.mark.parametrize(
    "answer_only, response",
    [(False, "<think>2 and andand 2</think><answer>4</answer>"), (True, "<answer>4</answer>")],
)
def test_only_the_response_and_its_end_carry_loss(
    options, folder, monkeypatch, answer_only, response
):
    tokenizer = Tokenizer.from_pretrained(folder)
    row = sft.load_rows(options(answer_only=answer_only), tokenizer)[1]
    # The response and its end, and no newline behind it.
    assert row.ids[row.scored].tolist() == [*tokenizer.encode(response), tokenizer.im_end]


def test_loss_is_the_sum_of_each_token_given_those_before(options, folder):
    rows = sft.load_rows(options(), Tokenizer.from_pretrained(folder))[:3]
    model = load_for_training(options())
    by_hand = 0.0
    for row in rows:  # one row at a time, plain log-softmax
        log_probs = model.logits(model(row.ids[None].long()))[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.scored[t]:
                by_hand -= log_probs[t - 1, row.ids[t]].item()
    assert sft.sft_loss(model, make_pack(rows)).item() == pytest.approx(by_hand, rel=1e-5)


def test_targets_that_are_not_scored_do_not_matter(options, folder):
    """What stands behind a response (a newline) may be anything: loss and gradient stay the same
    bits."""
    model = load_for_training(options())
    rows = sft.load_rows(options(), Tokenizer.from_pretrained(folder))[:3]
    changed = []
    for row in rows:
        last = int(row.scored.nonzero()[-1])
        assert last == len(row.ids) - 2
        changed.append(Row(row.ids.clone(), row.scored))
        changed[-1].ids[last + 1] += 7
    results = []
    for version in (rows, changed):
        model.zero_grad()
        loss = sft.sft_loss(model, make_pack(version))
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    # Not the same inputs, so the embedding's gradient has the newline's row elsewhere: it is zero.
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("variant", ["vl", "vl_tied", "text", "text_tied"])
def test_gradient_does_not_depend_on_packs_or_order(options, tmp_path, monkeypatch, variant):
    """In float32, each tensor to 1e-6 of its norm; whatever the packs, and whatever their order."""
    model = str(tiny.make_folder(tmp_path, variant))
    rows = sft.load_rows(options(model=model), Tokenizer.from_pretrained(model))
    assert (
        len({int(row.scored.sum()) for row in rows}) > 1
    )  # else the mean of means would be right too
    lengths = [len(row.ids) for row in rows]
    together = make_pack(rows).input_ids.shape[1]
    assert together < sum(lengths)  # they share the chat template's first tokens
    wanted, wanted_metrics = gradients(
        options(model=model, pack_tokens=1), rows, monkeypatch, torch.float32
    )
    for pack_tokens in (max(lengths), max(lengths) + min(lengths), together):
        found, found_metrics = gradients(
            options(model=model, pack_tokens=pack_tokens),
            rows[2:] + rows[:2],
            monkeypatch,
            torch.float32,
        )
        assert found.keys() == wanted.keys() and len(found) > 20
        for name, value in wanted.items():
            assert (found[name] - value).norm() <= 1e-6 * value.norm(), (name, pack_tokens)
        assert found_metrics == pytest.approx(wanted_metrics, rel=1e-6)


def test_packed_sequences_do_not_see_one_another(options, folder):
    """The same bits, whatever stands beside a sequence."""
    first, second, third, fourth, _ = sft.load_rows(options(), Tokenizer.from_pretrained(folder))
    model, found = load_for_training(options()), []
    for other in (first, fourth):
        pack = make_pack([other, second, third])
        hidden = model(
            pack.input_ids,
            position_ids=pack.position_ids,
            cu_seqlens=pack.cu_seqlens,
            shared=pack.shared,
        )
        # They begin alike, with the chat template: of that the pack has one only.
        found.append(hidden[0, pack.in_full][len(other.ids) :])
        alone = model(second.ids[None].long())[0]
        assert (found[-1][: len(alone)] - alone).abs().max() < 1e-5
    assert torch.equal(*found)
    # Without borders it would not be so.
    whole = torch.tensor([0, len(pack.in_full)])
    seen = model(
        pack.input_ids, position_ids=pack.position_ids, cu_seqlens=whole, shared=pack.shared
    )
    assert (seen[0, pack.in_full][len(fourth.ids) :] - found[0]).abs().max() > 1e-2


def test_packs_change_a_run_by_rounding_only(options, tmp_path):
    one_by_one = options(learning_rate=1e-3, pack_tokens=300, max_length=300)
    packed = options(learning_rate=1e-3, out=str(tmp_path / "packed"))
    sft.train(one_by_one)
    sft.train(packed)
    for one, other in zip(metrics(one_by_one), metrics(packed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["tokens"] == other["tokens"]


def test_rows_are_kept_small_and_texts_not_at_all(options, folder, tmp_path):
    path, record = (
        tmp_path / "long.jsonl",
        {"question": "Q", "answer": "A", "response": "R", "rest": "x" * 200_000},
    )
    path.write_text((json.dumps(record) + "\n") * 100)
    tracemalloc.start()
    rows = sft.load_rows(options(data=str(path)), Tokenizer.from_pretrained(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 100 and peak < 3e6
    assert (rows[0][0].dtype, rows[0][1].dtype) == (torch.int32, torch.bool)


def test_bad_records_are_left_out_if_asked(options, folder, tmp_path, capsys, data):
    path = tmp_path / "bad.jsonl"
    lines = [
        *data.read_text().splitlines(),
        "{",
        '{"question": "q", "answer": "a"}',
        '{"question": "q"}',
        "[]",
        "3",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="bad.jsonl: line 6: malformed JSON"):
        sft.load_rows(options(data=str(path)), Tokenizer.from_pretrained(folder))
    assert (
        len(
            sft.load_rows(
                options(data=str(path), skip_bad_lines=True), Tokenizer.from_pretrained(folder)
            )
        )
        == 5
    )
    first, *shown, rest = capsys.readouterr().err.splitlines()
    assert first == f"{path}: 5 bad records left out" and rest.strip() == "..."
    assert [line.split(": ")[1] for line in shown] == ["line 6", "line 7", "line 8"]
    path.write_text("\n".join(lines[5:]))
    with pytest.raises(
        InputError, match="bad.jsonl: none of the records is good; .* line 1: malformed JSON"
    ):
        sft.load_rows(
            options(data=str(path), skip_bad_lines=True), Tokenizer.from_pretrained(folder)
        )


def test_metrics_of_a_step_count_each_token_once(options, folder):
    rows = sft.load_rows(options(), Tokenizer.from_pretrained(folder))
    model = load_for_training(options())
    pack = make_pack(rows)
    mean = sft.sft_loss(model, pack).item() / len(pack.targets)
    found = sft.train_step(model, torch.optim.SGD(model.parameters()), rows, 0.0, options())
    assert found["loss"] == pytest.approx(mean, rel=1e-5) and found["grad_norm"] > 0
    assert found["tokens"] == sum(len(row.ids) for row in rows)


def test_learning_rate_falls_after_each_epoch_and_epochs_see_every_row(options, monkeypatch):
    o = options(epochs=3, learning_rate=1e-3, lr_decay=0.8)
    seen, original = [], sft.train_step
    monkeypatch.setattr(
        sft,
        "train_step",
        lambda m, opt, rows, *rest: (seen.append(rows), original(m, opt, rows, *rest))[1],
    )
    sft.train(o)
    found = metrics(o)
    assert [m["lr"] for m in found] == pytest.approx([1e-3] * 3 + [8e-4] * 3 + [6.4e-4] * 3)
    assert [m["epoch"] for m in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and [
        m["step"] for m in found
    ] == list(range(1, 10))
    assert [len(rows) for rows in seen] == [
        2,
        2,
        1,
    ] * 3  # the last batch of an epoch is smaller, not filled up
    epochs = [[row.ids.tolist() for rows in seen[i : i + 3] for row in rows] for i in (0, 3, 6)]
    assert all(len(set(map(tuple, epoch))) == 5 for epoch in epochs) and epochs[0] != epochs[1]
    assert {"loss", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= found[0].keys()


def test_over_long_examples_are_cut_and_not_given_an_end(options, folder, capsys):
    tokenizer = Tokenizer.from_pretrained(folder)
    whole = sft.load_rows(options(), tokenizer)
    longest = max(len(row.ids) for row in whole)
    cut = sft.load_rows(options(max_length=longest - 10), tokenizer)
    (ids, mask), (full_ids, full_mask) = (
        [t.tolist() for t in row[:2]] for row in (cut[-1], whole[-1])
    )
    assert len(cut) == 5 and len(ids) == longest - 10 == len(full_ids) - 10
    assert (
        ids == full_ids[:-10]
        and mask == full_mask[:-10]
        and mask[-1]
        and ids[-1] != tokenizer.im_end
    )
    assert "dropped" not in capsys.readouterr().err


def test_examples_whose_prompt_fills_the_length_are_dropped_and_counted(options, folder, capsys):
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [row.scored.tolist().index(True) for row in sft.load_rows(options(), tokenizer)]
    kept = sft.load_rows(
        options(max_length=prompts[2]), tokenizer
    )  # the third prompt just fills it, later ones are longer
    assert len(kept) == 2
    message = f"3 of 5 examples dropped: the prompt fills --max-length {prompts[2]}"
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="no example is left: the prompt fills --max-length 2$"):
        sft.load_rows(options(max_length=2), tokenizer)


def test_loss_falls_on_a_few_examples(options):
    o = options(epochs=15, batch_size=5, learning_rate=3e-3)
    sft.train(o)
    losses = [m["loss"] for m in metrics(o)]
    assert len(losses) == 15 and losses[-1] < 0.4 * losses[0] and losses[0] > 3


def test_max_steps_cuts_the_run_short(options):
    o = options(epochs=10, max_steps=4)
    sft.train(o)
    assert len(metrics(o)) == 4


def test_vision_tower_stays_as_it_is(options, folder):
    before = load_file(folder / "model.safetensors")
    o = options(learning_rate=1e-2, weight_decay=0.1)  # decay would move weights without a gradient
    sft.train(o)
    after = load_file(Path(o.out) / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("visual.")}
    model = load_for_training(o)
    rows = sft.load_rows(o, Tokenizer.from_pretrained(folder))
    sft.sft_loss(model, make_pack(rows)).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.visual.parameters())
    assert all(
        p.grad is not None for name, p in model.named_parameters() if not name.startswith("visual.")
    )


def test_model_folder_holds_the_trained_weights_and_loads(options, folder):
    o = options()
    sft.train(o)
    saved, source = (
        Qwen2_5_VL.from_pretrained(Path(o.out) / "model"),
        Qwen2_5_VL.from_pretrained(folder),
    )
    trained = read_checkpoint(o.out)
    for name, weight in saved.named_parameters():
        # The vision tower is not trained, and not in the checkpoint.
        assert name.startswith("visual.") or torch.equal(weight, trained[f"weights.{name}"])
    assert saved.config == source.config
    assert Tokenizer.from_pretrained(Path(o.out) / "model").encode(
        "and then"
    ) == Tokenizer.from_pretrained(folder).encode("and then")
    sft.train(
        options(model=str(Path(o.out) / "model"), out=o.out + "-2", max_steps=1)
    )  # and can be trained on


def test_text_only_folder_trains(options, tmp_path):
    o = options(model=str(tiny.make_folder(tmp_path / "text", "text_tied")), max_steps=2)
    sft.train(o)
    before, after = (
        Qwen2_5_VL.from_pretrained(path).state_dict() for path in (o.model, Path(o.out) / "model")
    )
    assert after.keys() == before.keys() and all(
        (after[name] != before[name]).any() for name in after
    )


def test_small_updates_of_a_bfloat16_model_are_kept(options, folder, tmp_path):
    """lr 3e-6 is below half a bfloat16 step of almost every weight: bare bfloat16 weights would
    never move."""
    source = tmp_path / "bf16"
    Qwen2_5_VL.from_pretrained(folder).save_pretrained(source, dtype=torch.bfloat16)
    copy_side_files(folder, source)
    o = options(model=str(source), learning_rate=3e-6, epochs=4)
    sft.train(o)
    before = Qwen2_5_VL.from_pretrained(source).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    master = read_checkpoint(o.out)[f"weights.{name}"]
    moved = (master - before[name]).abs()
    assert master.dtype == torch.float32
    assert (moved > 0).float().mean() > 0.95 and moved.max() < 12 * 3e-6 * 1.5
    assert moved.median() > 3e-6  # several steps have added up
    on_disk = load_file(Path(o.out) / "model" / "model.safetensors")[name]
    assert on_disk.dtype == torch.bfloat16 and torch.equal(on_disk, master.bfloat16())
    assert (on_disk == before[name].bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("pack_tokens", [4096, 250])
def test_resumed_run_equals_an_uninterrupted_one(options, tmp_path, monkeypatch, pack_tokens):
    same = {"epochs": 2, "save_every": 2, "lr_decay": 0.5}
    same |= {"pack_tokens": pack_tokens, "max_length": 250}
    whole = options(**same)
    sft.train(whole)
    broken, original = options(**same, out=str(tmp_path / "broken")), sft.train_step
    count = iter(range(100))

    def stop_in_the_sixth(*args):
        if next(count) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(sft, "train_step", stop_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        sft.train(broken)
    assert len(metrics(broken)) == 5
    monkeypatch.setattr(sft, "train_step", original)
    sft.train(options(**same, out=broken.out, resume=True))
    exact = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")
    assert [{k: m[k] for k in exact} for m in metrics(broken)] == [
        {k: m[k] for k in exact} for m in metrics(whole)
    ]
    weights = [load_file(Path(o.out) / "model" / "model.safetensors") for o in (whole, broken)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_command_line_run(options, folder, data, tmp_path, monkeypatch):
    sft.main(
        [
            "--model",
            str(folder),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "cli"),
            "--max-steps",
            "1",
            "--device",
            "cpu",
            "--answer-only",
        ]
    )
    config = json.loads((tmp_path / "cli" / "config.json").read_text())
    assert config["options"]["answer_only"] is True and config["options"]["learning_rate"] == 2e-4
    shutil.rmtree(tmp_path / "cli")


def test_paper_recipe_is_the_papers():
    o = parse_options(sft.SFTOptions, ["--recipe", "paper"], sft.RECIPES)
    assert (o.epochs, o.max_steps, o.batch_size, o.max_length, o.learning_rate, o.lr_decay) == (
        4,
        None,
        128,
        4096,
        1e-5,
        0.8,
    )
    assert (o.weight_decay, o.beta1, o.beta2, o.prompt_style, o.pack_tokens) == (
        0.0,
        0.9,
        0.999,
        "train",
        4096,
    )
    assert parse_options(sft.SFTOptions, ["--recipe", "med"], sft.RECIPES).prompt_style == "mcq"
