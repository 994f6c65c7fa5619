"""The Triton kernels of kernels/attention.py against the reference in float64: in Triton's interpreter, or on a GPU
where there is one. (float64 is the interpreter's only.)"""
import pytest
import torch

from data import load_image, make_prompt
from kernels import attention
from kernels.attention import attention_reference
from kernels.attention_triton import attention_decode_triton, attention_triton, columns, splits_for
from kernels.triton_or_none import AVAILABLE
from model import Qwen2_5_VL
from sample import SamplingParams, load_sampler
from hub.options import MICRO_BASE, MICRO_DATA

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16] + ([] if GPU else [torch.float64])


def tensor(*values):
    return torch.tensor(values)


CASES = {  # (B, T, S, H, K, D), mask
    "causal": ((2, 65, 65, 2, 2, 64), dict(causal=True)),
    "causal, group 2, D 128": ((1, 130, 130, 2, 1, 128), dict(causal=True)),
    "causal, group 7, D 80": ((1, 129, 129, 7, 1, 80), dict(causal=True)),
    "causal, group 8": ((1, 63, 63, 8, 1, 32), dict(causal=True)),
    "full, D 80": ((2, 64, 64, 3, 3, 80), dict(causal=False)),
    "full, cross": ((1, 7, 200, 4, 2, 16), dict(causal=False)),
    "one token": ((1, 1, 1, 2, 1, 64), dict(causal=True)),
    "scale": ((1, 20, 20, 2, 2, 32), dict(causal=True, scale=0.7)),
    "behind a cached prefix": ((2, 9, 150, 6, 2, 32), dict(causal=True)),
    "more queries than keys": ((1, 150, 9, 2, 1, 32), dict(causal=True)),
    "ragged keys": ((4, 5, 140, 4, 2, 32), dict(causal=True, key_lengths=tensor(0, 3, 131, 140))),
    "ragged keys, not causal": ((3, 5, 70, 4, 2, 32), dict(causal=False, key_lengths=tensor(70, 1, 0))),
    "windows": ((1, 232, 232, 2, 2, 80), dict(causal=False, cu_seqlens=tensor(0, 64, 128, 160, 224, 232))),
    "packed, empty and of one token": ((1, 150, 150, 2, 1, 32),
                                       dict(causal=True, cu_seqlens=tensor(0, 0, 1, 64, 64, 129, 130, 150, 150))),
    "1000 tokens": ((1, 1000, 1000, 1, 1, 16), dict(causal=True)),
    "packed, more segments than are looked at at once": (
        (1, 300, 300, 1, 1, 16), dict(causal=True, cu_seqlens=torch.arange(0, 601, 3).clamp(max=300))),
    "packed, long": ((1, 300, 300, 2, 1, 32), dict(causal=True, cu_seqlens=tensor(0, 257, 300))),
}


def inputs(sizes, dtype):
    B, T, S, H, K, D = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
            for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]


def run(function, tensors, upstream, **mask):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors, **mask)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


EVERY_DTYPE = ["causal, group 2, D 128", "windows", "ragged keys"]
COMBINATIONS = [(name, dtype) for name in CASES for dtype in DTYPES
                if GPU or dtype == torch.float32 or name in EVERY_DTYPE]


@pytest.mark.parametrize("name, dtype", COMBINATIONS, ids=str)
def test_output_and_gradients(name, dtype):
    sizes, mask = CASES[name]
    mask = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in mask.items()}
    tensors = inputs(sizes, dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(tensors[0].shape, generator=generator, dtype=torch.float64).to(DEVICE)
    wanted = run(attention_reference, [t.double() for t in tensors], upstream, **mask)
    found = run(attention_triton, tensors, upstream, **mask)
    for one, other in zip(found, wanted):
        assert one.dtype == dtype
        tolerance = TOLERANCE[dtype] * max(1, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=0)
    if GPU or name in EVERY_DTYPE:
        for one, other in zip(run(attention_triton, tensors, upstream, **mask), found):
            assert torch.equal(one, other)  # the same bits every time


def test_strided_inputs_are_read_where_they_are():
    """q, k and v as slices of one projection, and of a cache that lies heads before tokens."""
    qkv = torch.randn(1, 70, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    borders = tensor(0, 30, 70).to(DEVICE)
    upstream = torch.ones(1, 70, 4, 32, device=DEVICE)
    results = [run(f, qkv.unbind(2), upstream, causal=False, cu_seqlens=borders)
               for f in (attention_triton, attention_reference)]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    cache = torch.randn(2, 3, 2, 90, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    k, v = cache[:, :, :, :80].transpose(2, 3)
    q, lengths = torch.randn(3, 6, 4, 32).to(DEVICE), tensor(6, 80, 50).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(attention_triton(q, k, v, causal=True, key_lengths=lengths),
                                   attention_reference(q, k, v, causal=True, key_lengths=lengths), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(GPU, reason="no float64 products on a GPU")
def test_gradcheck():
    for sizes, mask in (((1, 3, 3, 2, 1, 16), dict(causal=True)),
                        ((1, 4, 4, 1, 1, 16), dict(causal=False, cu_seqlens=tensor(0, 1, 4)))):
        tensors = [t.requires_grad_() for t in inputs(sizes, torch.float64)]
        assert torch.autograd.gradcheck(lambda *t: attention_triton(*t, **mask), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("H, K, D", [(4, 4, 32), (14, 2, 64), (7, 1, 80), (8, 1, 128)])
def test_decoding(H, K, D, splits, dtype):
    """Rows of all lengths, 0 included; what lies behind a row's length is never read."""
    q, = inputs((6, 1, 1, H, K, D), dtype)[:1]
    cache = torch.randn(2, 6, K, 400, D, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    lengths = tensor(1, 390, 0, 64, 65, 300).to(DEVICE)
    k, v = cache[:, :, :, :390].transpose(2, 3)
    wanted = attention_reference(q.double(), k.double(), v.double(), causal=True, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        cache[:, b, :, length:] = float("nan")
    found = attention_decode_triton(q, k, v, lengths, scale=None, splits=splits)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=0)


def test_splits():
    assert splits_for(1, 100_000, 132) == 64 and splits_for(512, 4096, 132) == 1
    assert splits_for(16, 4096, 132) == 16 and splits_for(4, 100, 132) == 1


def test_columns():
    assert [columns(d) for d in (16, 64, 80, 96, 128)] == [(16, 0), (64, 0), (64, 16), (64, 32), (128, 0)]
    assert [columns(d) for d in (4, 8, 24, 72, 112)] == [None] * 5


def test_dispatcher(monkeypatch):
    q, k, v = inputs((1, 5, 5, 2, 1, 16), torch.float32)
    monkeypatch.setenv("KERNELS", "triton")
    assert attention(q.requires_grad_(), k, v, causal=True).grad_fn.name() == "TritonAttentionBackward"
    q, k, v = inputs((1, 5, 5, 2, 1, 8), torch.float32)  # too narrow for a tile: torch's path
    assert attention(q.requires_grad_(), k, v, causal=True).grad_fn.name() != "TritonAttentionBackward"
    q, k, v = inputs((1, 5, 5, 2, 1, 16), torch.float32)
    out = attention(q.requires_grad_(), k, v, causal=True, scale=-0.5)  # neither ours nor SDPA can do that
    assert out.grad_fn.name() != "TritonAttentionBackward"
    torch.testing.assert_close(out, attention_reference(q, k, v, causal=True, scale=-0.5))
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS must be"):
        attention(q, k, v, causal=True)


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


@pytest.mark.parametrize("kernels", ["sdpa", "triton", "reference"])
@pytest.mark.parametrize("mask", [dict(cu_seqlens=tensor(0, 4, 9)), dict(key_lengths=tensor(7)), {}], ids=str)
def test_under_autocast(monkeypatch, kernels, mask):
    """RoPE leaves q and k in float32 where v is in half precision: as in training and rollouts on a GPU."""
    monkeypatch.setenv("KERNELS", kernels)
    T = 1 if "key_lengths" in mask else 9
    q, k, v = inputs((1, T, 9, 4, 2, 16), torch.float32)
    q, k, v = q.requires_grad_(), k.requires_grad_(), v.to(torch.bfloat16).requires_grad_()
    mask = {name: value.to(DEVICE) for name, value in mask.items()}
    out = attention(q, k, v, causal=True, **mask)
    out.float().sum().backward()
    assert out.dtype == v.dtype and all(x.grad is not None and x.grad.dtype == x.dtype for x in (q, k, v))


def test_a_rollout_with_kernels(monkeypatch):
    """Prefill of packed prompts, the ViT's windows and full attention, decoding over the cache: the same greedy ids."""
    sampler, images = load_sampler(str(MICRO_BASE), DEVICE, "float32", max_batch=3)
    picture = load_image(MICRO_DATA / "images" / "A000.png")
    prompts = [make_prompt("Solve:", [picture], sampler.tokenizer, images),
               make_prompt("three plus four", [], sampler.tokenizer, images)]
    found = {}
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        done = sampler.generate(prompts, SamplingParams(max_new_tokens=5, temperature=0.0))
        found[kernels] = [(c.ids, torch.tensor(c.log_probs)) for group in done for c in group]
    for (ids, log_probs), (wanted, expected) in zip(found["triton"], found["sdpa"]):
        assert ids == wanted
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)


def test_the_model_in_half_precision(monkeypatch):
    """Logits with the kernels are about as far from float32's as torch's own are: at most half as far again."""
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
