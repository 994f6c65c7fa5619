"""The vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1): image patches in, one embedding per merged cell out.

Shapes: P patches of all images together, M = P / 4 merged cells (2 x 2 patches: one image token), H heads, D head dim,
C width. A grid (t, h, w) counts an image's patches; t is 1, since images only are supported. Patches arrive in the
processor's order, the four of a merged cell next to one another (data.py: preprocess_image).

Most blocks attend inside windows of 112 x 112 pixels (4 x 4 merged cells), which makes the cost linear in the image's
area; every eighth block attends to the whole image. Patches are reordered window by window once, before the first
block, and put back after the merger.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hub.config import VisionConfig
from kernels import attention

Grid = tuple[int, int, int]  # (t, h, w) in patches


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Normalised in float32 and cast *before* the weight is applied: Qwen2's bits depend on it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of each head (RoFormer, arXiv 2104.09864, in the half-split layout).

    x [..., tokens, heads, D]; cos and sin [..., tokens, D].
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)


def merged_positions(grids: list[Grid], merge: int) -> Tensor:
    """Row and column of each patch in its image, in the processor's order: [P, 2]."""
    out = []
    for _, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        position = torch.stack((row, column), -1).view(h // merge, merge, w // merge, merge, 2)
        out.append(position.transpose(1, 2).reshape(h * w, 2))
    return torch.cat(out)


def rope_2d(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D]: the first half of the frequencies turns with the row, the second with the column."""
    quarter = head_dim // 4
    inv_freq = 1.0 / 10000.0 ** (torch.arange(quarter, device=positions.device).float() / quarter)
    angles = (positions[:, :, None].float() * inv_freq).flatten(1)                                          # [P, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def window_layout(grids: list[Grid], config: VisionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The window order of the merged cells, and the segments' borders in patches.

    Returns index [M] (position in window order -> cell in image order), the borders of the windows and the borders of
    the images (both cu_seqlens, starting with 0). Windows at the right and lower border are cut by the image.
    """
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge                                   # window, in merged cells
    order, window_lengths, image_lengths, offset = [], [], [], 0
    for _, h, w in grids:
        cells = torch.arange(h // merge * (w // merge)).view(h // merge, w // merge) + offset
        for rows in cells.split(side, dim=0):
            for window in rows.split(side, dim=1):
                order.append(window.flatten())
                window_lengths.append(window.numel() * merge**2)
        offset += cells.numel()
        image_lengths.append(h * w)
    borders = [F.pad(torch.tensor(lengths).cumsum(0), (1, 0)) for lengths in (window_lengths, image_lengths)]
    return torch.cat(order), borders[0], borders[1]


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)                         # each [P, H, D]
        q, k = (apply_rope(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        out = attention(q[None], k[None], v[None], causal=False, cu_seqlens=cu_seqlens)
        return self.proj(out.reshape(x.shape))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). With biases in the ViT, without in the decoder."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A Conv3d whose stride is its kernel: a linear map of each patch. Kept as Conv3d for the checkpoint's shape."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Joins the 2 x 2 patches of a cell and maps them to the decoder's width: [P, C] -> [P / 4, out_hidden_size]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(),
                                 nn.Linear(self.width, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
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
        """pixel_values [P, 1176] of all images, their grids -> embeddings [P / 4, out_hidden_size] in image order."""
        order, windows, images = window_layout(grids, self.config)
        order = order.to(pixel_values.device)
        x = self.to_window_order(self.patch_embed(pixel_values), order)
        positions = merged_positions(grids, self.config.spatial_merge_size).to(x.device)
        head_dim = self.config.hidden_size // self.config.num_heads
        cos, sin = rope_2d(self.to_window_order(positions, order), head_dim)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, images if i in self.config.fullatt_block_indexes else windows)
        return self.merger(x)[order.argsort()]

    def to_window_order(self, x: Tensor, order: Tensor) -> Tensor:
        """Reorders patches [P, ...] cell by cell."""
        return x.view(-1, self.config.spatial_merge_size**2, x.shape[-1])[order].flatten(0, 1)
