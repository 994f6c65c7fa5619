"""The vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1), from patches to image tokens.

    pixel_values [P, 1176] -> patch_embed [P, C] -> 32 blocks [P, C] -> merger [M, decoder's width]

Shapes: P patches of all images together, M = P / 4 merged cells (2 x 2 patches: one image token),
H heads, D head dim, C width. A grid (t, h, w) counts an image's patches; t is 1, since only images
are supported, not videos. Patches arrive in the processor's order, the four of a merged cell next
to one another (data/images.py: preprocess_image).

Most blocks attend inside windows of 112 x 112 pixels (4 x 4 merged cells), which makes the cost
linear in the image's area; every eighth block attends to the whole image. Patches are reordered
window by window once, before the first block, and put back after the merger.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hub.config import MERGE, PATCH, TEMPORAL, Grid, VisionConfig
from kernels import apply_rope, attention, rms_norm, swiglu

# --- Parts that the decoder has, too: model.py imports them from here ---


class RMSNorm(nn.Module):
    """x / rms(x) * weight (kernels/layers.py)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). The tower's has biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


# --- Where the patches are ---


def patch_positions(grids: list[Grid]) -> Tensor:
    """Returns row and column of each patch in its image, in the processor's order: [P, 2]."""
    out = []
    for _, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = torch.stack((row, column), dim=-1)  # [h, w, 2]
        # Cell by cell, and the 2 x 2 patches of each.
        position = position.view(h // MERGE, MERGE, w // MERGE, MERGE, 2)
        out.append(position.transpose(1, 2).reshape(h * w, 2))
    return torch.cat(out)


def rope_2d(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [P, D] of positions [P, 2].

    The first half of the D/2 frequencies turns with the row, the second with the column.
    """
    quarter = head_dim // 4
    steps = torch.arange(quarter, device=positions.device).float()
    inv_freq = 1.0 / 10000.0 ** (steps / quarter)
    angles = (positions[:, :, None].float() * inv_freq).flatten(1)  # [P, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def window_layout(grids: list[Grid], config: VisionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the window order of the merged cells, and the borders of windows and of images.

    order [M] has, for each place in window order, the cell's number in image order. Both borders
    are cu_seqlens in patches: 0, then where each window (or image) ends. Windows at the right and
    the lower border are cut by the image.
    """
    side = config.window_size // (PATCH * MERGE)  # of a window, in merged cells
    order, window_lengths, image_lengths = [], [], []
    first_cell = 0
    for _, h, w in grids:
        rows, columns = h // MERGE, w // MERGE
        cells = first_cell + torch.arange(rows * columns).view(rows, columns)
        # Bands of `side` rows from top to bottom, in each the windows from left to right.
        for band in cells.split(side, dim=0):
            for window in band.split(side, dim=1):
                order.append(window.flatten())
                window_lengths.append(window.numel() * MERGE**2)
        image_lengths.append(h * w)
        first_cell += rows * columns
    return torch.cat(order), borders(window_lengths), borders(image_lengths)


def borders(lengths: list[int]) -> Tensor:
    """Returns cu_seqlens, the borders of segments that lie end to end: [3, 2] -> [0, 3, 5]."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


# --- The tower ---


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, in other words a linear map of each patch.

    It is a Conv3d for the checkpoint's sake, where its weight is [C, 3, 2, 14, 14].
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (TEMPORAL, PATCH, PATCH)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, 1176] -> [P, C]."""
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1))


class VisionAttention(nn.Module):
    """Each patch attends to all patches of its segment, which is a window or an image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x [P, C] -> [P, C]; cos and sin [P, D]; cu_seqlens has the borders of the segments."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)  # each [P, H, D]
        # cos and sin are float32 here, and so is the rotation (in the decoder: the weights' dtype).
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        out = attention(q[None], k[None], v[None], causal=False, cu_seqlens=cu_seqlens)
        return self.proj(out.reshape(x.shape))


class VisionBlock(nn.Module):
    """Attention, then the MLP, each behind a norm of its own and added to what went in."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x [P, C] -> [P, C]."""
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins the 2 x 2 patches of a cell, and maps them to the decoder's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.width = config.hidden_size * MERGE**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, config.out_hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] -> [M, out_hidden_size]."""
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    """`visual.*` of the checkpoint."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grids: list[Grid]) -> Tensor:
        """Patches [P, 1176] of all images, and their grids -> embeddings [M, out_hidden_size]."""
        # 1. The layout is computed on the CPU, and moved once for all blocks.
        layout = window_layout(grids, self.config)
        order, windows, images = (tensor.to(pixel_values.device) for tensor in layout)
        positions = patch_positions(grids).to(pixel_values.device)

        # 2. Patches and their positions, window by window.
        x = to_window_order(self.patch_embed(pixel_values), order)
        head_dim = self.config.hidden_size // self.config.num_heads
        cos, sin = rope_2d(to_window_order(positions, order), head_dim)

        # 3. Most blocks look inside windows, some at whole images.
        for i, block in enumerate(self.blocks):
            is_full = i in self.config.fullatt_block_indexes
            x = block(x, cos, sin, images if is_full else windows)

        # 4. One embedding for each cell, put back into image order.
        return self.merger(x)[order.argsort()]


def to_window_order(x: Tensor, order: Tensor) -> Tensor:
    """Reorders patches [P, ...] cell by cell, each with its four patches."""
    return x.view(-1, MERGE**2, x.shape[-1])[order].flatten(0, 1)
