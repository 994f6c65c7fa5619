"""The vision tower: window and position layouts, and features equal to transformers' (golden
values).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from hub.config import VisionConfig
from model import Qwen2_5_VL
from vision import VisionTower, patch_positions, rope_2d, window_layout

CONFIG = VisionConfig(hidden_size=1280)
GOLDEN = np.load(Path(__file__).parent / "golden" / "model_outputs.npz")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> VisionTower:
    return Qwen2_5_VL.from_pretrained(
        tiny.make_folder(tmp_path_factory.mktemp("tiny"))
    ).visual.requires_grad_(False)


@pytest.mark.parametrize(
    "grid, borders, start",
    [
        ((1, 8, 8), [0, 64], list(range(16))),
        ((1, 16, 16), [0, 64, 128, 192, 256], [0, 1, 2, 3, 8, 9, 10, 11, 16, 17]),
        ((1, 10, 14), [0, 64, 112, 128, 140], [0, 1, 2, 3, 7, 8, 9, 10, 14, 15]),
        ((1, 4, 4), [0, 16], [0, 1, 2, 3]),
        ((1, 2, 32), [0, 16, 32, 48, 64], list(range(16))),
    ],
)
def test_windows_are_the_published_ones(grid, borders, start):
    order, windows, images = window_layout([grid], CONFIG)
    assert windows.tolist() == borders and order[: len(start)].tolist() == start
    assert sorted(order.tolist()) == list(range(grid[1] * grid[2] // 4)) and images.tolist() == [
        0,
        grid[1] * grid[2],
    ]


def test_windows_of_several_images():
    order, windows, images = window_layout([(1, 34, 46), (1, 4, 4), (1, 10, 14)], CONFIG)
    assert len(windows) - 1 == 30 + 1 + 4 and images.tolist() == [0, 1564, 1580, 1720]
    assert windows[30:].tolist() == [1564, 1580, 1644, 1692, 1708, 1720]
    assert order[391:395].tolist() == [391, 392, 393, 394] and sorted(order.tolist()) == list(
        range(430)
    )
    assert {391 + 4, 391 + 5} <= set(
        order[395:].tolist()
    )  # an image's cells stay behind those of the one before


def test_patch_positions_follow_the_merged_cells():
    positions = patch_positions([(1, 4, 4), (1, 2, 4)])
    assert positions[:9].tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
        [2, 0],
    ]
    assert positions[16:].tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
    ]


def test_rotary_angles_of_rows_and_columns():
    """20 frequencies turn with the row, 20 with the column; both halves of the head alike."""
    cos, sin = rope_2d(torch.tensor([[0, 0], [3, 5]]), 80)
    assert cos.shape == (2, 80) and torch.equal(cos[0], torch.ones(80)) and not sin[0].any()
    angles = [p / 10000 ** (2 * i / 40) for p in (3, 5) for i in range(20)] * 2
    torch.testing.assert_close(
        cos[1].double(), torch.tensor(angles, dtype=torch.float64).cos(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        sin[1].double(), torch.tensor(angles, dtype=torch.float64).sin(), atol=1e-6, rtol=0
    )


def test_features_equal_transformers(tower):
    features = tower(tiny.patches(tiny.FEATURE_GRIDS), tiny.FEATURE_GRIDS)
    torch.testing.assert_close(
        features[:, ::8], torch.from_numpy(GOLDEN["vl/features"]), atol=3e-5, rtol=0
    )


def test_images_do_not_see_one_another(tower):
    grids = list(tiny.GRIDS.values())
    together = tower(tiny.patches(grids), grids).split([h * w // 4 for _, h, w in grids])
    for grid, features in zip(grids, together):
        torch.testing.assert_close(features, tower(tiny.patches([grid]), [grid]), atol=5e-6, rtol=0)
    shuffled = grids[::-1]
    again = tower(tiny.patches(shuffled), shuffled).split([h * w // 4 for _, h, w in shuffled])
    for one, other in zip(together, again[::-1]):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=0)


@pytest.mark.parametrize("full_attention", [False, True])
def test_windows_keep_attention_local(full_attention):
    """With windows alone, a changed patch changes its own window only; with a full block, every
    cell.
    """
    torch.manual_seed(0)
    config = VisionConfig(
        hidden_size=32,
        out_hidden_size=16,
        depth=2,
        num_heads=2,
        intermediate_size=32,
        fullatt_block_indexes=(1,) if full_attention else (),
    )
    tower = VisionTower(config).requires_grad_(False)
    grid, patches = (1, 10, 14), tiny.patches([(1, 10, 14)])
    before = tower(patches, [grid])
    patches[4 * 4] += (
        1.0  # the first patch of merged cell 4: row 0, column 4, the second window (3 cells wide)
    )
    changed = (tower(patches, [grid]) != before).any(-1).view(5, 7)
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(changed, torch.ones_like(changed) if full_attention else expected)


def test_patch_embedding_is_the_convolution():
    torch.manual_seed(0)
    embed = VisionTower(
        VisionConfig(hidden_size=32, depth=1, num_heads=2)
    ).patch_embed.requires_grad_(False)
    patches = tiny.patches([(1, 4, 4)])
    expected = embed.proj(patches.view(16, 3, 2, 14, 14)).flatten(1)
    torch.testing.assert_close(embed(patches), expected, atol=2e-6, rtol=1e-5)


def test_tower_in_bfloat16_is_close(tower):
    import copy

    grids = [(1, 10, 14)]
    half = copy.deepcopy(tower).to(torch.bfloat16)(tiny.patches(grids), grids)
    full = tower(tiny.patches(grids), grids)
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().mean() < 0.03
