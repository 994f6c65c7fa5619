"""The model against transformers (golden values), against itself (cached, batched, saved), and
against bad folders.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from data import InputError, make_pack, make_row
from hub.config import Config
from hub.weights import copy_side_files
from model import KVCache, PromptCache, Qwen2_5_VL, rope_positions, score

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS, GRADS = np.load(GOLDEN / "model_outputs.npz"), np.load(GOLDEN / "model_grads.npz")
IDS = tiny.special_ids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A variant's folder, for reading only."""
    root = tmp_path_factory.mktemp("tiny")
    return lambda variant: (
        root / variant if (root / variant).exists() else tiny.make_folder(root / variant, variant)
    )


@pytest.fixture(scope="module")
def load(folder):
    """A variant's model without gradients, loaded once."""
    models = {}

    def get(variant: str) -> Qwen2_5_VL:
        if variant not in models:
            models[variant] = Qwen2_5_VL.from_pretrained(folder(variant)).requires_grad_(False)
        return models[variant]

    return get


def forward(model: Qwen2_5_VL, case: tiny.Case) -> torch.Tensor:
    return model(
        case.input_ids,
        pixel_values=tiny.patches(case.grids) if case.grids else None,
        image_grid_thw=case.grids or None,
    )


def check_outputs(model: Qwen2_5_VL, variant: str, name: str) -> None:
    """transformers' golden logits and hidden states."""
    case = tiny.cases(variant)[name]
    hidden = forward(model, case)
    found = tiny.summary(hidden, model.logits(hidden), case.lengths)
    for kind, values in zip(("hidden", "logits"), found):
        torch.testing.assert_close(
            values, torch.from_numpy(OUTPUTS[f"{variant}/{name}/{kind}"]), atol=5e-5, rtol=0
        )


# Parity with transformers


@pytest.mark.parametrize(
    "variant, name", [(v, name) for v in tiny.VARIANTS for name in tiny.cases(v)]
)
def test_outputs_equal_transformers(load, variant, name):
    check_outputs(load(variant), variant, name)


@pytest.mark.parametrize(
    "variant, name",
    [("vl_tied", "text"), ("vl_group7", "text"), ("text", "text"), ("vl", "images")],
)
def test_gradients_equal_transformers(folder, variant, name):
    """Mean cross-entropy over all real tokens; every tensor's gradient by its norm and 16 values,
    relative to it.
    """
    model, case = Qwen2_5_VL.from_pretrained(folder(variant)), tiny.cases(variant)[name]
    logits = model.logits(forward(model, case))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten())
    loss.backward()
    assert abs(loss.item() - GRADS[f"{variant}/{name}/loss"]) < 1e-5
    wanted = {
        key.rpartition("/")[2]: torch.from_numpy(GRADS[key])
        for key in GRADS
        if f"{variant}/{name}/grad" in key
    }
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) and len(wanted) > 25
    for key, golden in wanted.items():
        torch.testing.assert_close(
            tiny.gradient_summary(found[key]), golden, atol=2e-5 * golden[0], rtol=0, msg=key
        )


@pytest.mark.parametrize(
    "change",
    [
        "sharded",
        "new layout",
        "new layout, sharded",
        "saved by transformers 5",
        "published keys, nested config",
        "partial vision_config",
        "rope_type",
        "tied head written out",
        "flag in text_config",
    ],
)
def test_every_published_form_of_a_folder_loads(tmp_path, change):
    tiny.make_folder(
        tmp_path,
        "vl_tied",
        layout="new" if "new layout" in change else "old",
        shards=3 if "sharded" in change else 1,
    )
    config = tiny.config_dict("vl_tied")
    if change == "saved by transformers 5":
        config = json.loads((GOLDEN / "model_config_v5.json").read_text())
    elif change == "published keys, nested config":
        config = tiny.nested_config(config)
    elif (
        change == "partial vision_config"
    ):  # what re-saves write: no field that has transformers' default
        for field in (
            "in_chans",
            "patch_size",
            "spatial_merge_size",
            "window_size",
            "temporal_patch_size",
        ):
            del config["vision_config"][field]
    elif change == "rope_type":
        config["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    elif change == "flag in text_config":
        config = {**tiny.nested_config(config), "tie_word_embeddings": False}
        config["text_config"]["tie_word_embeddings"] = True
    elif change == "tied head written out":
        state = load_file(tmp_path / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / "model.safetensors")
    if "new layout" not in change:
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = Qwen2_5_VL.from_pretrained(tmp_path).requires_grad_(False)
    for name in ("text", "images"):
        check_outputs(model, "vl_tied", name)


PUBLISHED = {  # fields of the hub's config.json that differ between the sizes
    "3B": (
        dict(
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            intermediate_size=11008,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        3420,
        3_754_622_976,
        824,
    ),
    "7B": (
        dict(
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        3420,
        8_292_166_656,
        729,
    ),
    "32B": (
        dict(
            hidden_size=5120,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            intermediate_size=27648,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        3456,
        33_452_718_336,
        None,
    ),
    "72B": (
        dict(
            hidden_size=8192,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            intermediate_size=29568,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        3456,
        73_410_777_344,
        None,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_of_the_published_sizes(size):
    fields, vision_intermediate, parameters, tensors = PUBLISHED[size]
    config = Config.from_dict(
        {
            "model_type": "qwen2_5_vl",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655,
            "video_token_id": 151656,
            "torch_dtype": "bfloat16",
            **fields,
            "vision_config": {
                "hidden_size": 1280,
                "out_hidden_size": fields["hidden_size"],
                "intermediate_size": vision_intermediate,
                "in_chans": 3,
            },
        }
    )
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert tensors is None or len(model.state_dict()) == tensors


# Positions


def config(variant: str = "vl") -> Config:
    return Config.from_dict(tiny.config_dict(variant))


def test_positions_are_the_published_ones():
    start, end, image = IDS["vision_start"], IDS["vision_end"], IDS["image_pad"]
    a = [1, 2, start, *[image] * 6, end, 3, 4]
    b = [1, start, *[image] * 4, end, 2]
    positions, following = rope_positions(torch.tensor([a]), [(1, 4, 6)], config())
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8],
    ]
    assert following.tolist() == [9]
    positions, following = rope_positions(torch.tensor([b]), [(1, 4, 4)], config())
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 2, 3, 4, 5],
    ]
    assert following.tolist() == [6]
    both, following = rope_positions(
        torch.tensor([a, b + [0] * 4]), [(1, 4, 6), (1, 4, 4)], config()
    )
    assert torch.equal(both[:, 1, :8], positions[:, 0]) and following.tolist() == [
        9,
        10,
    ]  # behind the padding, too


def test_positions_equal_transformers():
    case = tiny.cases("vl")["images"]
    positions, following = rope_positions(case.input_ids, case.grids, config())
    real = torch.arange(case.input_ids.shape[1]) < case.lengths[:, None]
    assert torch.equal(
        positions[:, real], torch.from_numpy(OUTPUTS["vl/images/position_ids"]).long()[:, real]
    )
    assert (following - case.input_ids.shape[1]).tolist() == OUTPUTS["vl/images/deltas"].tolist()


@pytest.mark.parametrize("variant", ["vl", "text"])
def test_positions_of_text_are_one_dimensional(variant):
    positions, following = rope_positions(torch.ones(2, 5, dtype=torch.long), [], config(variant))
    assert positions.tolist() == [[[0, 1, 2, 3, 4]] * 2] * 3 and following.tolist() == [5, 5]


def test_positions_of_text_wait_for_no_device():
    """The meta device has no values, so whatever looked at the ids would fail."""
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    positions, following = rope_positions(ids, [], config())
    assert positions.shape == (3, 2, 5) and positions.device.type == following.device.type == "meta"


# Cached, batched, selected


def prompts() -> list[tuple[list[int], list]]:
    """Ragged rows: text, one image at the start, several images, an image at the very end."""
    grids = tiny.GRIDS
    return [
        (tiny.row(20, 5), []),
        ([*tiny.row(21, 1, [grids["strip"]]), 7, 8], [grids["strip"]]),
        (tiny.row(22, 9, [grids["cut"], grids["one_window"]]), [grids["cut"], grids["one_window"]]),
        (tiny.row(23, 6) + [IDS["vision_start"]] + [IDS["image_pad"]] * 4, [grids["one_window"]]),
    ]


def packed(rows: list, config: Config) -> dict:
    """The arguments of a forward over rows packed end to end."""
    grids = [grid for _, grids in rows for grid in grids]
    positions = [rope_positions(torch.tensor([ids]), grids, config)[0] for ids, grids in rows]
    return {
        "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
        "image_grid_thw": grids or None,
        "position_ids": torch.cat(positions, -1),
        "pixel_values": tiny.patches(grids) if grids else None,
        "cu_seqlens": torch.tensor([0] + [len(ids) for ids, _ in rows]).cumsum(0),
    }


def cached(model: Qwen2_5_VL, rows: list, room: int, order: list[int] | None = None):
    """A cache whose slots hold the rows in the given order, and each slot's next position."""
    prompts = PromptCache(model.config, sum(len(ids) for ids, _ in rows))
    model(**packed(rows, model.config), cache=prompts)
    states = prompts.split([len(ids) for ids, _ in rows])
    following = [
        int(rope_positions(torch.tensor([ids]), grids, model.config)[1]) for ids, grids in rows
    ]
    order = list(range(len(rows))) if order is None else order
    cache = KVCache(model.config, len(order), max(len(ids) for ids, _ in rows) + room)
    cache.keys.fill_(1e4)  # what is read without having been written shows
    cache.values.fill_(1e4)
    for slot, row in enumerate(order):
        cache.fill(slot, *states[row])
    cache.longest = max(len(ids) for ids, _ in rows)
    return cache, torch.tensor(following)[order]


def decode(model: Qwen2_5_VL, cache: KVCache, tokens: Tensor, position: Tensor) -> Tensor:
    """One token [B] for each of the first B slots -> hidden states [B, C]."""
    hidden = model(tokens[:, None], position_ids=position.expand(3, -1)[..., None], cache=cache)[
        :, 0
    ]
    cache.lengths[: len(tokens)] += 1
    cache.longest += 1
    return hidden


VARIANTS = ["vl", "vl_tied", "vl_group7", "vl_group8", "text"]


def rows_for(variant: str) -> list:
    return prompts() if variant != "text" else [(tiny.row(i, 3 * i), []) for i in (1, 2, 5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_alone(load, variant):
    model, rows = load(variant), rows_for(variant)
    hidden = model(**packed(rows, model.config))[0].split([len(ids) for ids, _ in rows])
    for (ids, grids), part in zip(rows, hidden, strict=True):
        torch.testing.assert_close(
            part, forward(model, tiny.Case([ids], grids))[0], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(load, variant):
    """Prompts of different lengths, then tokens one by one: as if each whole row were run alone."""
    model, rows = load(variant), rows_for(variant)
    added = torch.tensor([tiny.row(40 + i, 6) for i in range(len(rows))])
    cache, position = cached(model, rows, room=6)
    steps = [decode(model, cache, added[:, i], position + i) for i in range(6)]
    assert cache.lengths.tolist() == [len(ids) + 6 for ids, _ in rows]
    for b, (ids, grids) in enumerate(rows):
        alone = forward(model, tiny.Case([ids + added[b].tolist()], grids))[0]
        torch.testing.assert_close(torch.stack(steps, 1)[b], alone[len(ids) :], atol=1e-5, rtol=0)


def test_slots_share_a_prompt_and_move(load):
    """A prompt may fill several slots, which then go their own ways; a moved slot goes on as if it
    had stayed; slots behind the first B are left alone.
    """
    model, rows, order = load("vl"), prompts(), [3, 0, 0, 2]
    cache, position = cached(model, rows, room=3, order=order)
    tokens = torch.tensor([5, 6, 7, 8])
    decode(model, cache, tokens, position)
    cache.move([3, 2], [0, 3])  # 0 <- 3 and 3 <- 2
    source, untouched = torch.tensor([3, 1, 2]), cache.keys[:, 3].clone()
    hidden = decode(model, cache, torch.tensor([9, 10, 11]), (position + 1)[source])
    for b, slot in enumerate(source.tolist()):
        ids, grids = rows[order[slot]]
        alone = forward(model, tiny.Case([ids + [int(tokens[slot]), 9 + b]], grids))[0]
        torch.testing.assert_close(hidden[b], alone[-1], atol=1e-5, rtol=0)
    assert torch.equal(cache.keys[:, 3], untouched)


def test_packed_rows_and_tokens_behind_a_cache_need_positions(load):
    model = load("vl")
    cache, _ = cached(model, prompts(), room=1)
    with pytest.raises(ValueError, match="position_ids"):
        model(torch.ones(4, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="position_ids"):
        model(torch.ones(1, 4, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("variant", ["vl", "vl_tied"])
def test_score_is_the_log_softmax_of_each_row_alone(load, variant):
    model, masked_ids = load(variant), torch.tensor([3, 280])
    rows = [make_row(tiny.row(i, n), [t >= n // 2 for t in range(n)]) for i, n in ((1, 7), (2, 12))]
    found, entropy = score(model, make_pack(rows), temperature=0.7, masked_ids=masked_ids)
    expected, expected_entropy = [], []
    for row in rows:
        logits = model.logits(model(row.ids.long()[None]))[0, :-1] / 0.7
        logits[:, masked_ids] = float("-inf")
        log_probs = logits.log_softmax(-1)
        scored = row.scored[1:]
        expected.append(log_probs.gather(1, row.ids[1:, None].long())[scored, 0])
        expected_entropy.append(-(log_probs.exp() * log_probs).nansum(-1)[scored])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-5, rtol=0)


# Saving


@pytest.mark.parametrize("variant", ["vl", "vl_tied", "text"])
def test_what_is_saved_is_the_published_layout(load, folder, tmp_path, variant):
    model = load(variant)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "old-shard.safetensors"}}'
    )
    model.save_pretrained(tmp_path)
    again = Qwen2_5_VL.from_pretrained(tmp_path)
    assert again.config == model.config
    case = tiny.cases(variant)["text"]
    assert torch.equal(forward(again, case), forward(model, case))
    original = load_file(folder(variant) / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys() and all(
        torch.equal(saved[k], original[k]) for k in saved
    )
    assert ("lm_head.weight" in saved) == (variant != "vl_tied")
    raw, hub = json.loads((tmp_path / "config.json").read_text()), tiny.config_dict(variant)
    assert all(raw[k] == hub[k] for k in raw if k != "vision_config")
    assert raw.get("vision_config", {}).items() <= hub.get("vision_config", {}).items()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_side_files_are_copied(folder, tmp_path):
    copy_side_files(folder("vl"), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    copy_side_files(tmp_path, tmp_path)


def test_the_processor_of_transformers_5_is_copied(folder, tmp_path):
    """What is saved must load there as what it was saved from: images and videos alike."""
    newer = tmp_path / "newer"
    tiny.make_folder(newer)
    (newer / "preprocessor_config.json").unlink()
    for name in ("processor_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        (newer / name).write_text("{}")
    (tmp_path / "saved").mkdir()
    copy_side_files(newer, tmp_path / "saved")
    names = {p.name for p in newer.iterdir()} - {"config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "saved").iterdir()} == names


def test_dtype_on_disk_and_in_memory(load, tmp_path):
    load("vl").save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load("vl").head_weight.dtype == torch.float32
    kept, wide = (
        Qwen2_5_VL.from_pretrained(tmp_path, dtype=dtype).requires_grad_(False)
        for dtype in (None, torch.float32)
    )
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    case = tiny.cases("vl")["images"]
    logits = kept.logits(forward(kept, case))
    assert (
        logits.dtype == torch.float32
        and (logits.float() - wide.logits(forward(wide, case))).abs().mean() < 0.03
    )


# Complaints


def complaint(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


NORM, QKV = "model.layers.1.input_layernorm.weight", "visual.blocks.2.attn.qkv.weight"
BAD_WEIGHTS = {
    "missing key": (lambda s: s.pop(NORM), f"missing {NORM}"),
    "unexpected key": (
        lambda s: s.update(extra=torch.ones(1)),
        "model.safetensors: unexpected extra",
    ),
    "wrong shape": (
        lambda s: s.update({QKV: s[QKV].T.contiguous()}),
        rf"model.safetensors: {QKV} has shape \[32, 96\], expected \[96, 32\]",
    ),
    "NaN": (
        lambda s: s[QKV].__setitem__((3, 3), float("nan")),
        f"model.safetensors: {QKV} has NaN or infinite values",
    ),
    "infinite": (
        lambda s: s[NORM].__setitem__(0, float("inf")),
        f"{NORM} has NaN or infinite values",
    ),
    "no head": (lambda s: s.pop("lm_head.weight"), "missing lm_head.weight"),
    "no tower": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("visual.")],
        "missing visual.*and 44 more",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_listed(tmp_path, name):
    change, expected = BAD_WEIGHTS[name]
    tiny.make_folder(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert str(tmp_path) in message and re.search(expected, message), message


def test_all_problems_are_listed_at_once(tmp_path):
    tiny.make_folder(tmp_path)

    def change(state):
        state.update(extra=torch.ones(1), more=torch.ones(1))
        state.pop("model.norm.weight")

    rewrite(tmp_path / "model.safetensors", change)
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    for part in (
        "model.safetensors: unexpected extra",
        "model.safetensors: unexpected more",
        "missing model.norm.weight",
    ):
        assert part in message, message


# The index decides which file has a tensor


SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def home_of(folder: Path, key: str) -> tuple[Path, Path]:
    """The shard that the index assigns a tensor to, and the other one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    home = index["weight_map"][key]
    [other] = set(SHARDS) - {home}
    return folder / home, folder / other


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    change(raw["weight_map"])
    path.write_text(json.dumps(raw))


LEFT_OVER = {
    "another value": torch.zeros(64),
    "not finite": torch.full((64,), float("nan")),
    "another shape": torch.zeros(7),
    "quantised": torch.zeros(64, dtype=torch.int8),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_a_tensor_that_the_index_assigns_elsewhere_is_not_read(tmp_path, folder, name):
    tiny.make_folder(tmp_path, shards=2)
    _, other = home_of(tmp_path, NORM)
    rewrite(other, lambda s: s.update({NORM: LEFT_OVER[name], "old.head": torch.ones(3)}))
    found = Qwen2_5_VL.from_pretrained(tmp_path).state_dict()
    for key, value in Qwen2_5_VL.from_pretrained(folder("vl")).state_dict().items():
        assert torch.equal(found[key], value), key


def test_files_that_the_index_does_not_name_are_not_opened(tmp_path):
    tiny.make_folder(tmp_path, shards=2)
    for name in ("model.safetensors", "model-00001-of-00009.safetensors"):
        (tmp_path / name).write_text("no weights")
    assert Qwen2_5_VL.from_pretrained(tmp_path).state_dict()


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path):
    tiny.make_folder(tmp_path, shards=2, layout="new")
    key = tiny.new_key(NORM)
    home, other = home_of(tmp_path, key)
    rewrite(home, lambda s: s.pop(key))
    rewrite(other, lambda s: s.update({key: torch.ones(64)}))
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert f"{home.name}: missing {key}, which model.safetensors.index.json" in message
    assert message.count("missing") == 1


def test_an_index_of_another_model_is_told_from_the_weights(tmp_path):
    tiny.make_folder(tmp_path, shards=2)
    change_index(tmp_path, lambda found: found.pop(NORM))
    assert f"missing {NORM}" in complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    change_index(tmp_path, lambda found: found.update({NORM: SHARDS[0], "value.head": SHARDS[1]}))
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert f"{SHARDS[1]}: missing value.head" in message
    rewrite(tmp_path / SHARDS[1], lambda s: s.update({"value.head": torch.ones(2)}))
    assert f"{SHARDS[1]}: unexpected value.head" in complaint(Qwen2_5_VL.from_pretrained, tmp_path)


def test_a_tensor_that_is_there_in_both_layouts_is_named(tmp_path):
    tiny.make_folder(tmp_path)
    rewrite(
        tmp_path / "model.safetensors", lambda s: s.update({tiny.new_key(NORM): torch.zeros(64)})
    )
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert re.search(rf"({NORM} is {tiny.new_key(NORM)}|{tiny.new_key(NORM)} is {NORM})", message)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.language_model.rotary_emb.original_inv_freq",
        "visual.rotary_pos_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_buffers_that_are_computed_here_are_ignored(tmp_path, key, shards):
    tiny.make_folder(tmp_path, shards=shards)
    expected = Qwen2_5_VL.from_pretrained(tmp_path).state_dict()

    def check():
        found = Qwen2_5_VL.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    path = tmp_path / ("model.safetensors" if shards == 1 else SHARDS[1])
    rewrite(path, lambda s: s.update({key: torch.full((8,), float("inf"))}))
    check()
    if shards == 2:  # whether or not the file has what the index says
        change_index(tmp_path, lambda found: found.update({key: SHARDS[0]}))
        check()


# Quantised weights


Q_PROJ = "model.layers.0.self_attn.q_proj"


def awq(state):
    del state[f"{Q_PROJ}.weight"]
    state[f"{Q_PROJ}.qweight"] = torch.zeros(64, 8, dtype=torch.int32)
    state[f"{Q_PROJ}.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)
    state[f"{Q_PROJ}.scales"] = torch.ones(1, 64, dtype=torch.float16)


def four_bits(state):
    state[f"{Q_PROJ}.weight"] = torch.zeros(2048, 1, dtype=torch.uint8)
    state[f"{Q_PROJ}.weight.absmax"] = torch.ones(64)


def stored_as(dtype):
    return lambda s: s.update({f"{Q_PROJ}.weight": s[f"{Q_PROJ}.weight"].to(dtype)})


QUANTISED = {
    "AWQ": (awq, "AWQ or GPTQ"),
    "bitsandbytes": (four_bits, "bitsandbytes, 4 bits"),
    "FP8 with a scale": (
        lambda s: stored_as(torch.float8_e4m3fn)(s) or s.update({"a.weight_scale": torch.ones(1)}),
        "FP8",
    ),
    "FP8 without": (stored_as(torch.float8_e5m2), "FP8"),
    "whole numbers": (stored_as(torch.int8), "I8"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("shards", [1, 2])
def test_quantised_weights_are_refused_by_what_they_are(tmp_path, name, shards):
    change, kind = QUANTISED[name]
    tiny.make_folder(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    if shards == 2:  # a good one first
        (tmp_path / "model.safetensors").rename(tmp_path / SHARDS[1])
        save_file({"model.norm.weight": torch.ones(64)}, tmp_path / SHARDS[0])
        state = load_file(tmp_path / SHARDS[1])
        weight_map = {key: SHARDS[1] for key in state} | {"model.norm.weight": SHARDS[0]}
        index = {"weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert f"quantised weights ({kind}) are not supported" in message
    assert "take the model that they were made from" in message


def test_misshapen_and_missing_are_told_apart(tmp_path):
    tiny.make_folder(tmp_path, layout="new")
    rewrite(tmp_path / "model.safetensors", lambda s: s.update({tiny.new_key(NORM): torch.ones(3)}))
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert (
        f"{tiny.new_key(NORM)} has shape [3], expected [64]" in message
        and "missing model" not in message
    )


def test_text_weights_do_not_pass_for_a_vision_model_or_the_reverse(tmp_path, folder):
    tiny.make_folder(tmp_path, "text")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config_dict("vl")))
    assert "missing visual." in complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    tiny.make_folder(tmp_path, "vl")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config_dict("text")))
    assert "unexpected visual." in complaint(Qwen2_5_VL.from_pretrained, tmp_path)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tiny.make_folder(tmp_path, "vl_tied")
    rewrite(
        tmp_path / "model.safetensors",
        lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}),
    )
    assert "lm_head.weight differs from the embedding" in complaint(
        Qwen2_5_VL.from_pretrained, tmp_path
    )


def test_missing_and_damaged_files_are_named(tmp_path):
    assert "nowhere: no such folder" in complaint(Qwen2_5_VL.from_pretrained, tmp_path / "nowhere")
    tiny.make_folder(tmp_path, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100, whole + b"more"):
        shard.write_bytes(damaged)
        assert f"{shard}: not a readable safetensors file" in complaint(
            Qwen2_5_VL.from_pretrained, tmp_path
        )
    shard.unlink()
    assert f"{shard}: no such file" in complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": ["a"]}'):
        index.write_text(text)
        assert str(index) in complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    for name in ("../outside.safetensors", "..", ""):  # never read outside the folder
        save_file({"a": torch.ones(1)}, tmp_path.parent / "outside.safetensors")
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
        assert re.search("no such file|not a readable safetensors file", message), message
    index.unlink()
    assert "model.safetensors: no such file" in complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    for text in ("", "{", "[1]", "\x00", '"text"'):
        (tmp_path / "config.json").write_text(text)
        assert str(tmp_path / "config.json") in complaint(Qwen2_5_VL.from_pretrained, tmp_path)


BAD_CONFIGS = [  # path to the field, its value, what the line says; "-" removes the field
    ("model_type", "llama", "model_type 'llama' is not supported"),
    ("model_type", "-", "model_type None is not supported"),
    ("quantization_config", {"quant_method": "awq"}, r"quantised weights \(awq\) are not"),
    ("quantization_config", {"quant_algo": "FP8"}, r"quantised weights \(quantization_config\)"),
    ("text_config", {"quantization_config": {"quant_method": "fp8"}}, r"weights \(fp8\) are not"),
    ("hidden_size", "-", "hidden_size is missing"),
    ("rms_norm_eps", "-", "rms_norm_eps is missing"),
    ("rope_theta", "-", "rope_theta is missing"),
    ("hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
    ("use_sliding_window", True, "use_sliding_window True is not supported"),
    ("torch_dtype", "nn", "torch_dtype 'nn' is not supported"),
    ("torch_dtype", "int8", "torch_dtype 'int8' is not supported"),
    ("rope_scaling", "-", "mrope_section None"),
    ("rope_scaling.type", "yarn", "rope_type 'yarn' is not supported"),
    ("rope_scaling.mrope_section", [2, 3, 4], "is not three numbers of sum 8"),
    ("rope_scaling.mrope_section", [8], "is not three numbers"),
    ("image_token_id", "-", "image_token_id is missing"),
    ("vision_config", "-", "vision_config: hidden_size is missing"),
    ("vision_config.hidden_size", "-", "vision_config: hidden_size is missing"),
    ("vision_config.hidden_act", "relu", "vision_config.hidden_act 'relu' is not supported"),
    ("vision_config.out_hidden_size", 32, "vision_config: out_hidden_size is not hidden_size"),
    # Preprocessing has one patch size, merged cell, and number of frames.
    ("vision_config.patch_size", 16, "vision_config.patch_size 16 is not supported"),
    (
        "vision_config.temporal_patch_size",
        1,
        "vision_config.temporal_patch_size 1 is not supported",
    ),
    ("vision_config.spatial_merge_size", 3, "vision_config.spatial_merge_size 3 is not supported"),
    # What is no number, or one that nothing can be computed with.
    ("hidden_size", "64", "hidden_size '64' is malformed"),
    ("hidden_size", 64.0, "hidden_size 64.0 is malformed"),
    ("num_attention_heads", 0, "num_attention_heads 0 is malformed"),
    ("num_hidden_layers", True, "num_hidden_layers True is malformed"),
    ("vocab_size", -1, "vocab_size -1 is malformed"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps '1e-6' is malformed"),
    ("rope_theta", 0, "rope_theta 0 is malformed"),
    ("rope_theta", float("nan"), "rope_theta nan is malformed"),
    ("rope_scaling.mrope_section", ["2", "3", "3"], "mrope_section .* is malformed"),
    ("rope_scaling.mrope_section", [-2, 5, 5], "mrope_section .* is malformed"),
    ("rope_scaling.mrope_section", "2,3,3", "mrope_section '2,3,3' is malformed"),
    ("image_token_id", "<|image_pad|>", "image_token_id .* is malformed"),
    ("eos_token_id", ["a"], "eos_token_id 'a' is malformed"),
    ("text_config", [1], "text_config is not a JSON object"),
    ("vision_config", "x", "vision_config is not a JSON object"),
    ("vision_config.num_heads", 3, "vision_config: num_heads do not divide hidden_size"),
    ("vision_config.window_size", 0, "vision_config: window_size 0 is malformed"),
    ("vision_config.fullatt_block_indexes", "1", "fullatt_block_indexes '1' is malformed"),
    ("quantization", {"bits": 4}, r"quantised weights \(quantization\) are not"),
]


@pytest.mark.parametrize("field, value, expected", BAD_CONFIGS)
def test_bad_config_values_are_named(tmp_path, field, value, expected):
    raw = tiny.config_dict("vl")
    *outer, last = field.split(".")
    where = raw[outer[0]] if outer else raw
    where.pop(last) if value == "-" else where.update({last: value})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = complaint(Qwen2_5_VL.from_pretrained, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json: ") and re.search(expected, message), message


def test_images_and_image_tokens_must_match(load):
    model, image = load("vl"), IDS["image_pad"]
    four = torch.tensor([[1, *[image] * 4, 2]])
    pixels = tiny.patches([(1, 4, 4)])
    text = torch.tensor([[1, 2, 3]])
    one = dict(pixel_values=pixels, image_grid_thw=[(1, 4, 4)])
    assert "0 image tokens for images of 4 merged cells" in complaint(model, text, **one)
    twice = dict(pixel_values=torch.cat((pixels, pixels)), image_grid_thw=[(1, 4, 4)] * 2)
    assert "4 image tokens for images of 8 merged cells" in complaint(model, four, **twice)
    larger = dict(pixel_values=tiny.patches([(1, 4, 6)]), image_grid_thw=[(1, 4, 6)])
    assert "4 image tokens for images of 6 merged cells" in complaint(model, four, **larger)
    five = torch.tensor([[1, *[image] * 5, 2]])
    assert "5 image tokens for images of 4 merged cells" in complaint(model, five, **one)


def test_patches_and_grids_go_together(load):
    model, four = load("vl"), torch.tensor([[1, *[IDS["image_pad"]] * 4, 2]])
    with pytest.raises(ValueError, match="go together"):
        model(four, pixel_values=tiny.patches([(1, 4, 4)]))
    with pytest.raises(ValueError, match="go together"):
        model(four, image_grid_thw=[(1, 4, 4)])


def test_a_text_model_has_no_tower(load):
    assert load("text").visual is None and load("text").config.vision is None
    assert "visual" not in "".join(load("text").state_dict())
