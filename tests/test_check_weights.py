"""check_weights.py and parity.py on tiny folders: right ones, wrong ones, and bad ones.

transformers is played by our own model on a folder of its choice; one test asks the real one, where
it is installed.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tiny
from benchmarks import agreement, check_weights, parity
from benchmarks.check_inputs import TEXT, draw_picture, make_inputs
from data import ImageConfig, Prompt, Tokenizer
from hub.options import run_command
from model import Qwen2_5_VL

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def threads():
    """The commands set the number of threads; other tests get back what they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder whose model knows the text by heart, nearly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tiny.make_folder(tmp_path_factory.mktemp("learned") / "vl", "vl")
    model = Qwen2_5_VL.from_pretrained(folder).train()
    ids = torch.tensor([Tokenizer.from_pretrained(folder).encode(TEXT)])
    optimizer = torch.optim.AdamW(model.decoder_weights().values(), lr=5e-3)
    for _ in range(200):
        loss = F.cross_entropy(model.logits(model(ids))[0, :-1], ids[0, 1:])
        if loss < 0.6:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6, loss
    model.save_pretrained(folder)
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code, stdout and stderr."""

    def start(module, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as caught:
            run_command(module.main)
        return caught.value.code, *capsys.readouterr()

    return start


def altered(folder, target, change):
    """Writes a copy of a folder whose tensors `change` has changed, in place."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    state = load_file(target / WEIGHTS)
    change(state)
    save_file(state, target / WEIGHTS)
    return target


@pytest.fixture
def play(monkeypatch):
    """Makes our own model on a folder play transformers; `more` changes what it reports."""

    def start(folder, **more) -> None:
        model = Qwen2_5_VL.from_pretrained(folder).requires_grad_(False)

        def ask_peer(python, script, job):
            if script == "transformers_generate.py":
                return [{"ids": more["ids"], "seconds": [1.0]}]
            inputs, outputs, losses = load_file(job["inputs"]), {}, {}
            for name in [key.removesuffix(".ids") for key in inputs if key.endswith(".ids")]:
                ids, images = inputs[f"{name}.ids"], {}
                if f"{name}.grid" in inputs:
                    images["pixel_values"] = inputs[f"{name}.patches"]
                    images["image_grid_thw"] = inputs[f"{name}.grid"].tolist()
                logits = model.logits(model(ids[None], **images))[0]
                if f"{name}.scored" in inputs:
                    labels = ids.masked_fill(~inputs[f"{name}.scored"], -100)
                    losses[name] = F.cross_entropy(logits[:-1], labels[1:]).item()
                else:
                    outputs[name] = logits
            save_file(outputs, job["outputs"])
            report = {"loading": [], "losses": losses, "tokens": "none", "chat": "none"}
            return [report | {"patches": "none", "transformers": "5", "torch": "2"} | more]

        monkeypatch.setattr(agreement, "ask_peer", ask_peer)
        monkeypatch.setattr(parity, "ask_peer", ask_peer)

    return start


# Without transformers


def test_a_right_folder_is_plausible(learned, run, tmp_path):
    code, out, _ = run(check_weights, learned, "--peer", "none", "--json", tmp_path / "report.json")
    assert code == 0 and out.splitlines()[-1].startswith("PLAUSIBLE: "), out
    assert "81 of 81" in out and "195,840 parameters" in out and "> Which shapes" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "PLAUSIBLE" and len(report["ours"]["answers"]) == 2
    assert report["ours"]["copy_loss"] < 1 and report["folder"]["tensors_expected"] == 81
    assert {"load", "text", "picture", "lesson", "answers"} == set(report["ours"]["seconds"])
    assert f"**check_weights: PLAUSIBLE**: {report['reason']}" in out


def test_a_json_file_in_no_folder_is_said_before_anything_is_computed(learned, run, tmp_path):
    nowhere = tmp_path / "none" / "report.json"
    code, out, err = run(check_weights, learned, "--peer", "none", "--json", nowhere)
    assert code != 0 and "there is no folder" in err and out == ""


def roll_embedding(state):
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0)


def turn_norm(state):
    state["model.norm.weight"] = -state["model.norm.weight"]


@pytest.mark.parametrize("change", [roll_embedding, turn_norm])
def test_a_tensor_in_disorder_is_seen_without_transformers(learned, run, tmp_path, change):
    folder = altered(learned, tmp_path / "wrong", change)
    code, out, _ = run(check_weights, folder, "--peer", "none")
    assert code == 1 and out.splitlines()[-1].startswith("REFUTED: mean loss on English"), out


KEY = "model.layers.1.self_attn.k_proj.bias"


def drop(state):
    del state[KEY]


def add(state):
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)


def misshape(state):
    state[KEY] = state[KEY][:-1].clone()


def spoil(state):
    state[KEY][3] = float("nan")


@pytest.mark.parametrize(
    "change, said",
    [
        (drop, f"missing {KEY}"),
        (add, "unexpected model.layers.2.mlp.up_proj.weight"),
        (misshape, f"{KEY} has shape [31], expected [32]"),
        (spoil, f"{KEY} has NaN"),
    ],
)
def test_a_wrong_tensor_refutes_by_name(learned, run, tmp_path, change, said):
    folder = altered(learned, tmp_path / "wrong", change)
    code, out, _ = run(check_weights, folder, "--peer", "none")
    last = out.splitlines()[-1]
    assert code == 1 and last.startswith("REFUTED: ") and said in last, out
    if change is not spoil:
        assert ("81 of 81" in out) == (change is add)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", '{"model_type": "llama"}', "model_type 'llama' is not supported"),
        ("tokenizer.json", "{}", "tokenizer.json: malformed tokenizer"),
        ("preprocessor_config.json", "[]", "preprocessor_config.json: not a JSON object"),
        (WEIGHTS, None, f"{WEIGHTS}: no such file"),
        (WEIGHTS, "no weights at all", f"{WEIGHTS}: not a readable safetensors file"),
    ],
)
def test_a_bad_folder_is_one_line(run, tmp_path, name, content, said):
    folder = tiny.make_folder(tmp_path / "bad", "vl")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    code, _, error = run(check_weights, folder, "--peer", "none")
    assert code == 2 and said in error and len(error.splitlines()) == 1, error


def test_a_peer_that_cannot_run_is_one_line(learned, run):
    code, _, error = run(check_weights, learned, "--peer", "/no/such/python")
    assert code == 2 and "--peer /no/such/python" in error and len(error.splitlines()) == 1, error


# Beside transformers, played by ourselves


@pytest.mark.parametrize("variant", ["vl", "vl_tied", "text", "text_tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_agrees_is_confirmed(run, play, tmp_path, variant, dtype):
    """Also of weights that know no English, since the other side says the same."""
    folder = tiny.make_folder(tmp_path / variant, variant)
    play(folder)
    code, out, _ = run(check_weights, folder, "--peer", "played", "--dtype", dtype)
    last = out.splitlines()[-1]
    assert code == 0 and last.startswith("CONFIRMED: ") and "but mean loss on English" in last, out
    assert ("logits of a text, logits of a picture, an SFT loss" in last) == (variant[:2] == "vl")
    assert "the chat template" not in last  # the folder has none


def zero_bias(state):
    state["model.layers.0.self_attn.v_proj.bias"].zero_()


def zero_tower(state):
    state["visual.blocks.1.attn.proj.weight"].zero_()


@pytest.mark.parametrize(
    "change, said", [(zero_bias, "logits of the text"), (zero_tower, "logits of the picture")]
)
def test_one_tensor_that_differs_is_refuted(learned, run, play, tmp_path, change, said):
    play(altered(learned, tmp_path / "other", change))
    code, out, _ = run(check_weights, learned, "--peer", "played")
    last = out.splitlines()[-1]
    assert code == 1 and last.startswith(f"REFUTED: {said} differ by up to"), out
    assert ("logits of the text" in last) == (change is zero_bias)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"tokens": [1, 2]}, "the text has other ids"),
        ({"chat": [1, 2]}, "the conversation has other ids"),
        ({"losses": {"lesson": 1.0}}, "the SFT loss differs by"),
        ({"loading": ["model.norm.weight"]}, "transformers lacks model.norm.weight"),
    ],
)
def test_whatever_else_differs_is_refuted(learned, run, play, more, said):
    play(learned, **more)
    code, out, _ = run(check_weights, learned, "--peer", "played")
    assert code == 1 and out.splitlines()[-1].startswith(f"REFUTED: {said}"), out


def test_ids_and_template_are_part_of_the_verdict(learned, run, play):
    """The template has one image token, where the prompt has as many as the picture needs."""
    tokenizer = Tokenizer.from_pretrained(learned)
    inputs = make_inputs(tokenizer, ImageConfig.from_pretrained(learned))
    asked = inputs.picture.ids
    assert asked.count(tokenizer.image_pad) == 63
    first = asked.index(tokenizer.image_pad)
    play(learned, tokens=tokenizer.encode(TEXT), chat=asked[: first + 1] + asked[first + 63 :])
    code, out, _ = run(check_weights, learned, "--peer", "played")
    assert code == 0 and "an SFT loss, ids, the chat template" in out.splitlines()[-1], out


def test_how_far_logits_are_apart():
    theirs = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert agreement.compare_logits(theirs, theirs) == {"max_diff": 0, "mean_kl": 0, "top1": 1}
    # KL of (1/2, 1/2) from (1/5, 4/5) is log(5/4) = 0.2231.
    ours = torch.tensor([[0.0, 4.0], [3.0, 1.0]]).log_softmax(-1)
    ours[0] = torch.tensor([0.2, 0.8]).log()
    found = agreement.compare_logits(ours, theirs.log_softmax(-1))
    assert found["mean_kl"] == pytest.approx(0.2231 / 2, abs=1e-4)
    assert found["max_diff"] == pytest.approx(0.9163, abs=1e-4) and found["top1"] == 0.5


def test_the_bounds_of_bfloat16():
    """Logits may differ there, distributions may not."""
    close = {"max_diff": 0.6, "mean_kl": 1e-3, "top1": 0.97}
    faults = agreement.find_faults
    assert faults({"text": close, "loss": 1e-3}, "bfloat16") == []
    assert len(faults({"text": close | {"mean_kl": 0.02}, "loss": 0.0}, "bfloat16")) == 1
    assert len(faults({"text": close | {"top1": 0.8}, "loss": 0.0}, "bfloat16")) == 1
    assert len(faults({"text": close, "loss": float("nan")}, "float32")) == 2
    assert len(faults({"loss": 0.0, "patches": 0.1}, "float32")) == 1


def test_the_picture_is_drawn_by_a_formula():
    picture = draw_picture()
    assert picture.size == (250, 190)
    assert picture.getpixel((70, 95)) == (220, 30, 30)
    assert picture.getpixel((180, 100)) == (30, 60, 220)
    assert picture.getpixel((249, 0)) == (254, 254, 254) and picture.getpixel((0, 0))[0] == 155


# Parity on a file of questions


@pytest.fixture
def questions(tmp_path):
    """Worked questions in GSM8K's schema."""
    path = tmp_path / "questions.jsonl"
    records = [
        {"question": f"What is {n} + 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


SIZES = "--tokens 100 --questions 2 --examples 3 --new-tokens 4 --pack-tokens 150".split()


def test_parity_beside_itself(learned, run, play, questions, tmp_path):
    play(learned, ids=[[1], [2]])
    wanted = ["--data", questions, "--peer", "played", *SIZES, "--json", tmp_path / "out.json"]
    code, out, error = run(parity, learned, *wanted)
    assert code == 0, error
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["logits"] == {"tokens": 100, "max_diff": 0, "mean_kl": 0, "top1": 1}
    loss = figures["loss"]
    assert loss["examples"] == 3 and abs(loss["ours"] - loss["transformers"]) < 1e-5
    assert loss["max_diff_of_an_example"] < 1e-5
    parted = figures["greedy"]["parted"]
    assert figures["greedy"]["equal"] == 0 and len(parted) == 2
    first = parted["questions-1"]
    assert first["place"] == 0 and first["ours"] == first["likeliest"][:1] and first["gap"] > 0


def test_the_first_difference_of_continuations(learned):
    model = Qwen2_5_VL.from_pretrained(learned).requires_grad_(False)
    prompt = Prompt([1, 2, 3])
    assert parity.first_difference(model, prompt, [4, 5], [4, 5]) is None
    found = parity.first_difference(model, prompt, [4, 5, 6], [4, 5])
    best = model.logits(model(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1]).topk(2)
    assert found["place"] == 2 and found["theirs"] == [] and found["ours"] == [6]
    assert found["gap"] == pytest.approx((best.values[0] - best.values[1]).item(), abs=1e-5)


@pytest.mark.parametrize(
    "argv, said", [([], "--data is missing"), (["--questions", "9"], "examples only")]
)
def test_parity_says_what_is_wrong(learned, run, questions, argv, said):
    data = ["--data", questions] if argv else []
    code, _, error = run(parity, learned, *data, *argv)
    assert code == 2 and said in error and len(error.splitlines()) == 1, error


# The real one


@pytest.mark.parametrize("variant", ["vl", "vl_group8", "text"])
def test_the_real_transformers_confirms(run, tmp_path, variant):
    pytest.importorskip("transformers")
    folder = tiny.make_folder(tmp_path / variant, variant)
    code, out, error = run(check_weights, folder)
    assert code == 0 and out.splitlines()[-1].startswith("CONFIRMED: "), out + error
    assert "text ids: equal" in out
