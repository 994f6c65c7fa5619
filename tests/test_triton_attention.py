"""The Triton attention kernels against the reference in float64: in Triton's interpreter, or on a
GPU (TEST_ON=gpu, tests/conftest.py)."""

import pytest
import torch

from data import load_image, make_prompt
from hub.options import MICRO_BASE, MICRO_DATA
from kernels import attention
from kernels.attention import attention_reference
from kernels.attention_triton import attention_by_tiles, attention_triton, head_constants
from kernels.decode_triton import attention_decode_triton, splits_for
from kernels.triton_or_none import AVAILABLE
from model import Qwen2_5_VL
from sample import SamplingParams, load_sampler

needs_triton = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensor(*values):
    return torch.tensor(values)


def causal_pack(*borders):
    return dict(causal=True, cu_seqlens=tensor(*borders))


CASES = {  # (B, T, S, H, K, D), mask
    "causal": ((2, 65, 65, 2, 2, 64), dict(causal=True)),
    "causal, group 2, D 128": ((1, 130, 130, 2, 1, 128), dict(causal=True)),
    "causal, group 7, D 80": ((1, 129, 129, 7, 1, 80), dict(causal=True)),
    "causal, group 8": ((1, 63, 63, 8, 1, 32), dict(causal=True)),
    "full, D 80": ((2, 64, 64, 3, 3, 80), dict(causal=False)),
    "full, D 8": ((2, 33, 33, 1, 1, 8), dict(causal=False)),
    "one token": ((1, 1, 1, 2, 1, 64), dict(causal=True)),
    "windows": (
        (1, 232, 232, 2, 2, 80),
        dict(causal=False, cu_seqlens=tensor(0, 64, 128, 160, 224, 232)),
    ),
    "packed, empty and of one token": (
        (1, 150, 150, 2, 1, 32),
        causal_pack(0, 0, 1, 64, 64, 129, 130, 150, 150),
    ),
    "packed, many segments": (
        (1, 140, 140, 1, 1, 16),
        dict(causal=True, cu_seqlens=torch.arange(0, 301, 3).clamp(max=140)),
    ),
    "packed, long": ((1, 300, 300, 2, 1, 32), causal_pack(0, 257, 300)),
}
# The interpreter is slow. Of 16-bit numbers it sees one case per size of tiles.
SIXTEEN_BITS = ["causal, group 2, D 128", "windows"]
COMBINATIONS = [
    (name, dtype)
    for name in CASES
    for dtype in TOLERANCE
    if GPU or dtype == torch.float32 or name in SIXTEEN_BITS
]


def inputs(sizes, dtype):
    B, T, S, H, K, D = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D)
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    return [x.to(DEVICE, dtype) for x in tensors]


def on_device(mask):
    return {key: x.to(DEVICE) if torch.is_tensor(x) else x for key, x in mask.items()}


def run(function, tensors, upstream, **mask):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors, **mask)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 3, 4, 10])
def test_the_plain_tiles(T, causal):
    """The algorithm in PyTorch is attention: also where the last tile is not full."""
    q, k, v = (x.cpu() for x in inputs((1, T, T, 1, 1, 8), torch.float32))
    wanted = attention_reference(q, k, v, causal=causal)[0, :, 0]
    found = attention_by_tiles(q[0, :, 0], k[0, :, 0], v[0, :, 0], causal=causal)
    torch.testing.assert_close(found, wanted)


@needs_triton
@pytest.mark.parametrize("name, dtype", COMBINATIONS, ids=str)
def test_output_and_gradients(name, dtype):
    sizes, mask = CASES[name]
    mask = on_device(mask)
    tensors = inputs(sizes, dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(tensors[0].shape, generator=generator, dtype=torch.float64).to(DEVICE)
    wanted = run(attention_reference, [t.double() for t in tensors], upstream, **mask)
    found = run(attention_triton, tensors, upstream, **mask)
    for one, other in zip(found, wanted):
        assert one.dtype == dtype
        tolerance = TOLERANCE[dtype] * max(1, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=0)
    if GPU or name == "windows":
        for one, other in zip(run(attention_triton, tensors, upstream, **mask), found):
            assert torch.equal(one, other)  # the same bits every time


@needs_triton
def test_strided_inputs():
    """q, k and v as slices of one projection, and keys as slices of a cache, heads first."""
    qkv = torch.randn(1, 70, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    borders = tensor(0, 30, 70).to(DEVICE)
    upstream = torch.ones(1, 70, 4, 32, device=DEVICE)
    results = [
        run(f, qkv.unbind(2), upstream, causal=False, cu_seqlens=borders)
        for f in (attention_triton, attention_reference)
    ]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    cache = torch.randn(2, 3, 2, 90, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    k, v = cache[:, :, :, :80].transpose(2, 3)
    q = torch.randn(3, 1, 4, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    lengths = tensor(6, 80, 50).to(DEVICE)
    wanted = attention_reference(q, k, v, causal=True, key_lengths=lengths)
    for values in (v, v.contiguous()):  # the last: keys and values do not lie alike
        found = attention_decode_triton(q, k, values, lengths)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("H, K, D", [(4, 4, 32), (14, 2, 64), (7, 1, 80)])
def test_decoding(H, K, D, splits, dtype):
    """Rows of all lengths, 0 included; what lies behind a row's length is never read."""
    if dtype != torch.float32 and H != 14 and not GPU:
        pytest.skip("the interpreter is slow: 16 bits for one shape")
    (q,) = inputs((5, 1, 1, H, K, D), dtype)[:1]
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 5, K, 310, D, generator=generator).to(DEVICE, dtype)
    lengths = tensor(1, 300, 0, 64, 65).to(DEVICE)
    k, v = cache[:, :, :, :300].transpose(2, 3)
    wanted = attention_reference(
        q.double(), k.double(), v.double(), causal=True, key_lengths=lengths
    )
    for b, length in enumerate(lengths.tolist()):
        cache[:, b, :, length:] = float("nan")
    found = attention_decode_triton(q, k, v, lengths, splits=splits)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)


def test_splits():
    assert splits_for(1, 100_000, 132) == 64 and splits_for(512, 4096, 132) == 1
    assert splits_for(16, 4096, 132) == 16 and splits_for(4, 100, 132) == 1


@needs_triton
def test_head_dims_are_padded_to_powers_of_two():
    widths = [head_constants(torch.empty(1, 2, D), torch.empty(1, 1, D)) for D in (8, 16, 80, 128)]
    assert [(x["D"], x["WIDTH"]) for x in widths] == [(8, 16), (16, 16), (80, 128), (128, 128)]


@needs_triton
def test_dispatcher(monkeypatch):
    def path(sizes, **mask):
        q, k, v = inputs(sizes, torch.float32)
        return attention(q.requires_grad_(), k, v, causal=True, **mask).grad_fn.name()

    monkeypatch.setenv("KERNELS", "triton")
    assert path((1, 5, 5, 2, 1, 16)) == "ViewBackward0"  # of TritonAttention's rows
    monkeypatch.setenv("KERNELS", "sdpa")
    assert path((1, 5, 5, 2, 1, 16)) == "TransposeBackward0"
    monkeypatch.setenv("KERNELS", "triton")
    assert path((1, 5, 5, 2, 1, 256)) == "TransposeBackward0"  # too wide for a tile: torch's path
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS must be") as error:
        path((1, 5, 5, 2, 1, 16))
    assert isinstance(error.value, OSError)  # which a command turns into one line


@needs_triton
def test_the_model_is_the_same_with_kernels(monkeypatch):
    """Logits of the micro base, and the gradients of a loss on them."""
    ids = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model, results = Qwen2_5_VL.from_pretrained(MICRO_BASE).to(DEVICE), []
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        model.zero_grad()
        logits = model.logits(model(ids))
        logits.logsumexp(-1).square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@needs_triton
def test_a_rollout_with_kernels(monkeypatch):
    """Prefill of packed prompts, the ViT's windows and full attention, decoding over the cache: the
    same greedy ids."""
    sampler, images = load_sampler(str(MICRO_BASE), DEVICE, "float32", max_batch=3)
    picture = load_image(MICRO_DATA / "images" / "A000.png")
    prompts = [
        make_prompt("Solve:", [picture], sampler.tokenizer, images),
        make_prompt("three plus four", [], sampler.tokenizer, images),
    ]
    found = {}
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        done = sampler.generate(prompts, SamplingParams(max_new_tokens=5, temperature=0.0))
        found[kernels] = [(c.ids, torch.tensor(c.log_probs)) for group in done for c in group]
    assert len(found["sdpa"]) == 2
    for (ids, log_probs), (wanted, expected) in zip(found["triton"], found["sdpa"], strict=True):
        assert ids == wanted
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)


@needs_triton
def test_the_model_in_half_precision(monkeypatch):
    """Logits with the kernels are about as far from float32's as torch's own are: at most half as
    far again."""
    ids = torch.randint(0, 60, (1, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    model, errors = Qwen2_5_VL.from_pretrained(MICRO_BASE).to(DEVICE), {}
    with torch.no_grad():
        monkeypatch.setenv("KERNELS", "sdpa")
        wanted = model.logits(model(ids))
        model = model.to(torch.bfloat16)
        for kernels in ("sdpa", "triton"):
            monkeypatch.setenv("KERNELS", kernels)
            errors[kernels] = (model.logits(model(ids)).float() - wanted).norm()
    assert 0 < errors["triton"] <= 1.5 * errors["sdpa"]
