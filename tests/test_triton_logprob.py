"""The Triton kernels of kernels/logprob.py against the reference in float64: in Triton's interpreter, or on a GPU where
there is one. (float64 is the interpreter's only.)"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
from data import collate, make_row
from kernels import logprob, logprob_triton
from kernels.logprob import pick_path, token_log_probs_reference, token_log_probs_torch
from kernels.logprob_triton import chunk_width, tile_sizes, tiles_per_program, token_log_probs_triton
from kernels.triton_or_none import AVAILABLE
from model import Qwen2_5_VL
from sft import sft_loss
from hub.options import MICRO_BASE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] + ([] if GPU else [torch.float64])
# Of log-probs and entropy, in nats; of gradients, relative to the largest (16 bits: those of logits are rounded too).
OUTPUT_ERROR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 1e-5}
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WAYS = ["triton", "cublas"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of ids also in small vocabularies."""
    monkeypatch.setattr(logprob_triton, "LEAST_WIDTH", 256)
    monkeypatch.setattr(logprob_triton, "GRADIENT_ELEMENTS", {"triton": 1, "cublas": 1})
    monkeypatch.setattr(logprob_triton, "CUBLAS_ELEMENTS", 1)


def inputs(N, C, V, dtype, *, scale=1.0):
    """hidden, weight, targets, and an upstream gradient with zeros and both signs."""
    g = torch.Generator().manual_seed(N + 10 * C + 100 * V)
    hidden, weight = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((N, C), (V, C)))
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    upstream[1::3] = 0
    targets = torch.randint(0, V, (N,), generator=g)
    return [x.to(DEVICE) for x in ((hidden * scale * C**-0.5).to(dtype), weight.to(dtype), targets, upstream)]


def run(function, hidden, weight, targets, upstream, **options):
    """log_probs, entropy, and the gradients of hidden and weight."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    log_probs, entropy = function(hidden, weight, targets, **options)
    gradients = torch.autograd.grad(log_probs, (hidden, weight), upstream.to(log_probs.dtype))
    return [log_probs.detach(), entropy, *gradients]


def check(hidden, weight, targets, upstream, *, products, **options):
    """Everything against the reference on the same numbers in float64; twice, bit for bit. Returns what was found."""
    dtype = hidden.dtype
    wanted = run(token_log_probs_reference, hidden.double(), weight.double(), targets, upstream, **options)
    found = run(token_log_probs_triton, hidden, weight, targets, upstream, products=products, **options)
    wide = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in found] == [wide, wide, dtype, dtype]
    for one, other in zip(found[:2], wanted[:2]):
        torch.testing.assert_close(one.double(), other, atol=OUTPUT_ERROR[dtype], rtol=OUTPUT_ERROR[dtype])
    for one, other in zip(found[2:], wanted[2:]):
        torch.testing.assert_close(one.double(), other, atol=GRADIENT_ERROR[dtype] * other.abs().max().item(), rtol=0)
    again = run(token_log_probs_triton, hidden, weight, targets, upstream, products=products, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, again))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize("N, C, V", [(1, 64, 300), (7, 24, 129), (63, 32, 65), (64, 40, 256), (65, 64, 257),
                                     (129, 70, 311), (1000, 16, 90)])
def test_outputs_and_gradients(N, C, V, products, dtype):
    check(*inputs(N, C, V, dtype), products=products)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("products", WAYS)
def test_several_chunks_splits_and_tiles(small_chunks, products, dtype):
    check(*inputs(70, 48, 1300, dtype), products=products, temperature=0.5)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("products", WAYS)
def test_temperature(products, temperature):
    check(*inputs(9, 20, 100, torch.float32), products=products, temperature=temperature)


@pytest.mark.parametrize("products", WAYS)
def test_masked_ids(small_chunks, products):
    """Whole tiles and whole chunks of them; a masked target has log-prob -inf and still pushes the others down."""
    hidden, weight, targets, upstream = inputs(9, 20, 700, torch.float32)
    masked_ids = torch.cat([torch.arange(300), torch.arange(512, 600), torch.tensor([650])]).to(DEVICE)
    targets = targets % 50 + 300
    targets[2] = 550
    log_probs, entropy, _, d_weight = check(hidden, weight, targets, upstream, products=products, masked_ids=masked_ids)
    assert log_probs[2] == float("-inf") and log_probs[[0, 1, 3]].isfinite().all() and entropy.isfinite().all()
    assert upstream[2] != 0 and not d_weight[masked_ids].any()


@pytest.mark.parametrize("products", WAYS)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_entropy_does_not_cancel(scale, products):
    """From uniform to all but certain, in float32: logits up to a thousand; entropies of 1e-3 nats have 3 digits."""
    hidden, weight, targets, _ = inputs(40, 16, 200, torch.float32, scale=scale)
    wanted = token_log_probs_reference(hidden.double(), weight.double(), targets)[1]
    found = token_log_probs_triton(hidden, weight, targets, products=products)[1]
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), wanted, atol=3e-7, rtol=1e-3)


@pytest.mark.parametrize("products", WAYS)
def test_a_target_that_does_not_exist_gives_nan(products):
    """Not some plausible number; the reference raises, for which a GPU would have to be waited for."""
    hidden, weight, targets, _ = inputs(5, 20, 100, torch.float32)
    targets[1], targets[3] = 100, -100
    log_probs, _ = token_log_probs_triton(hidden, weight, targets, products=products)
    assert log_probs.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("products", WAYS)
def test_sums_over_chunks_are_not_rounded(small_chunks, products, monkeypatch):
    """In 16 bits, hidden's gradient over 6 chunks is as near to the truth as over one (Liger#1391 was not)."""
    hidden, weight, targets, upstream = inputs(20, 16, 1500, torch.bfloat16, scale=3.0)
    wanted = run(token_log_probs_reference, hidden.double(), weight.double(), targets, upstream)[2]
    errors = []
    for width in (256, 4096):
        monkeypatch.setattr(logprob_triton, "LEAST_WIDTH", width)
        found = run(token_log_probs_triton, hidden, weight, targets, upstream, products=products)[2]
        errors.append((found.double() - wanted).square().mean().sqrt().item())
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("products", WAYS)
def test_only_the_gradients_that_are_needed(products, monkeypatch):
    """With the head frozen no product is spent on its gradient, and the other way round."""
    hidden, weight, targets, upstream = inputs(9, 20, 100, torch.float32)
    wanted, calls = run(token_log_probs_reference, hidden, weight, targets, upstream)[2:], []
    for name in ("matmul", "matmul_triton"):
        original = getattr(logprob, name)
        monkeypatch.setattr(logprob, name, lambda a, b, *rest, original=original, **options:
                            calls.append((a.shape[0], b.shape[1])) or original(a, b, *rest, **options))
    for index, sizes in ((0, (9, 20)), (1, (100, 20))):
        leaves = [hidden.clone(), weight.clone()]
        leaves[index].requires_grad_()
        log_probs, entropy = token_log_probs_triton(*leaves, targets, products=products)
        assert not entropy.requires_grad
        calls.clear()
        log_probs.backward(upstream.float())
        torch.testing.assert_close(leaves[index].grad, wanted[index], atol=1e-5, rtol=1e-5)
        assert leaves[1 - index].grad is None and {(9, 20), (100, 20)} & set(calls) == {sizes}


def test_tied_head():
    """The weight is also the embedding that hidden comes from; its gradients add up."""
    _, weight, targets, upstream = inputs(9, 20, 100, torch.float32)
    grads = []
    for function in (token_log_probs_reference, token_log_probs_triton):
        weight = weight.detach().requires_grad_()
        function(weight[targets.flip(0)].tanh(), weight, targets)[0].backward(upstream.float())
        grads.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(GPU, reason="in float64, which is the interpreter's")
@pytest.mark.parametrize("products", WAYS)
def test_gradcheck(small_chunks, products):
    hidden, weight, targets, _ = inputs(3, 2, 270, torch.float64)
    weight[5:260] = weight[5:6]  # few columns to differentiate, in two chunks
    masked_ids = torch.tensor([2])
    targets = torch.tensor([0, 265, 3])

    def function(hidden, some):
        whole = torch.cat([some[:5], weight[5:260], some[5:]])
        options = dict(temperature=0.5, masked_ids=masked_ids, products=products)
        return token_log_probs_triton(hidden, whole, targets, **options)[0]

    some = torch.cat([weight[:5], weight[260:]])
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), some.requires_grad_()))


@pytest.mark.parametrize("products", WAYS)
def test_autocast(small_chunks, products, monkeypatch):
    """float32 weights, 16-bit products: log-probs of the rounded inputs, gradients summed and kept in float32."""
    hidden, weight, targets, upstream = inputs(9, 32, 700, torch.float32)
    dtype = torch.bfloat16
    rounded = [x.to(dtype).double() for x in (hidden, weight)]
    wanted = run(token_log_probs_reference, *rounded, targets, upstream)
    widths, original = [], logprob_triton.chunks
    monkeypatch.setattr(logprob_triton, "chunks", lambda w, width, dtype: widths.append(width) or original(w, width, dtype))
    with torch.autocast(DEVICE, dtype):
        found = run(token_log_probs_triton, hidden, weight, targets, upstream, products=products)
    assert widths == [256, 256] and all(x.dtype == torch.float32 for x in found)
    for one, other, error in zip(found, wanted, (3e-6, 3e-6, *2 * [GRADIENT_ERROR[dtype]])):
        torch.testing.assert_close(one.double(), other, atol=error * other.abs().max().item(), rtol=0)


def test_strided_hidden():
    hidden, weight, targets, upstream = inputs(9, 40, 100, torch.float32)
    narrow = hidden[:, ::2], weight[:, 20:]  # columns apart; rows apart
    wanted = run(token_log_probs_reference, *narrow, targets, upstream)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    log_probs, _ = token_log_probs_triton(leaves[0][:, ::2], leaves[1][:, 20:], targets)
    log_probs.backward(upstream.float())
    found = [log_probs.detach(), leaves[0].grad[:, ::2], leaves[1].grad[:, 20:]]
    for one, other in zip(found, (wanted[0], *wanted[2:])):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("products", WAYS)
def test_no_tensor_of_all_logits_is_made(small_chunks, products, monkeypatch):
    """Nothing of N x V values is allocated in either pass, nor kept between them."""
    hidden, weight, targets, upstream = inputs(64, 16, 2000, torch.float32)
    made, saved = [], []
    for name in ("empty", "full", "zeros"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: made.append(original(*a, **k)) or made[-1])
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        log_probs, _ = token_log_probs_triton(hidden, weight, targets, products=products)
    log_probs.backward(upstream.float())
    assert max(x.numel() for x in made) == 64 * 256 and len(made) >= 2
    assert max(x.numel() for x in saved) <= 2000 * 16


def test_how_the_work_is_cut():
    assert tiles_per_program(64, 594, 132) == 18
    assert tiles_per_program(1, 594, 132) == 5 and tiles_per_program(1, 1, 132) == 1
    assert chunk_width(152_064, 2**24, 8192) == 2048 and chunk_width(152_064, 2**24, 10**6) == logprob_triton.LEAST_WIDTH
    assert chunk_width(152_064, 2**24, 100) == 152_064 and chunk_width(152_064, 2**24, 100, 3584) == 4608
    for shared in (logprob_triton.H100_SHARED, 166_912, 101_376):  # H100, A100, RTX 4090
        sizes = tile_sizes(torch.bfloat16, 8192, shared)
        bytes_used = sizes["num_stages"] * (sizes["BN"] + sizes["BV"]) * sizes["BK"] * 2
        assert bytes_used <= shared and sizes["num_stages"] >= 3


def test_dispatcher(monkeypatch):
    hidden, weight, targets, _ = inputs(5, 20, 100, torch.float32)
    monkeypatch.delenv("KERNELS", raising=False)
    assert pick_path(hidden) is (token_log_probs_triton if GPU else token_log_probs_torch)
    for name, path in (("triton", token_log_probs_triton), ("sdpa", token_log_probs_torch),
                       ("sdpa", token_log_probs_torch), ("reference", token_log_probs_reference)):
        monkeypatch.setenv("KERNELS", name)
        assert pick_path(hidden) is path
    assert pick_path(hidden[:0]) is token_log_probs_reference
    monkeypatch.setenv("KERNELS", "triton")
    assert logprob.token_log_probs(hidden[:0], weight, targets[:0])[0].shape == (0,)
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS must be"):
        logprob.token_log_probs(hidden, weight, targets)
    monkeypatch.setenv("LOGPROB_PRODUCTS", "fast")
    with pytest.raises(ValueError, match="LOGPROB_PRODUCTS must be"):
        token_log_probs_triton(hidden, weight, targets)


def test_without_triton():
    """As on macOS: everything imports, and the PyTorch path computes."""
    code = ("import sys; sys.modules['triton'] = None; import os; os.environ['KERNELS'] = 'triton'; import torch; "
            "from kernels import token_log_probs; "
            "ids = torch.zeros(2, dtype=torch.long); "
            "print(token_log_probs(torch.zeros(2, 3), torch.zeros(4, 3), ids)[1].tolist())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[1.386"), done.stderr


def test_sft_loss_is_the_same_with_kernels(monkeypatch):
    """Loss and gradients of the micro base, with KERNELS=triton and with plain PyTorch."""
    model, results = Qwen2_5_VL.from_pretrained(MICRO_BASE).to(DEVICE), []
    model.visual.requires_grad_(False)
    ids, mask = (x.to(DEVICE) for x in collate([make_row(range(1, 12), [False] * 4 + [True] * 7),
                                                make_row(range(20, 27), [False] * 3 + [True] * 4)]))
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        model.zero_grad()
        loss = sft_loss(model, ids, mask)
        loss.backward()
        results.append({"loss": loss.detach(),
                        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, atol=1e-5 * wanted.abs().max().item() + 1e-6, rtol=1e-4)


def test_grpo_log_probs_are_the_same_with_kernels(monkeypatch):
    """With temperature and masked ids, and with its reuse of entropy."""
    model = Qwen2_5_VL.from_pretrained(MICRO_BASE).to(DEVICE)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 4:], mask[1, 5:8] = True, True
    batch = grpo.Batch(*(x.to(DEVICE) for x in (torch.arange(2, 22).view(2, 10), mask, torch.zeros(2, 10),
                                                torch.ones(2))))
    results = []
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        results.append(grpo.completion_log_probs(model, batch, 0.7, torch.tensor([30, 31, 40], device=DEVICE)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("products, most", [("triton", 0.1e9), ("cublas", 0.25e9)])
def test_gpu_memory_at_full_size(products, most):
    """Beyond inputs and gradients, at 8,192 tokens of the 7B's head in bfloat16."""
    hidden = torch.randn(8192, 3584, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(152_064, 3584, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = torch.randint(0, 152_064, (8192,), device="cuda")
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    a @ a  # cuBLAS' own workspace is not ours
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_log_probs_triton(hidden, weight, targets, products=products)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes < most
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("products", WAYS)
def test_as_near_to_the_truth_as_pytorch(small_chunks, products):
    """16 bits: not more than 1.5 times plain PyTorch's error against float64; a real head's width on a GPU."""
    sizes, dtype = ((700, 3584, 5000), torch.bfloat16) if GPU else ((40, 200, 900), torch.float16)
    hidden, weight, targets, upstream = inputs(*sizes, dtype, scale=3.0)
    wanted = run(token_log_probs_reference, hidden.double(), weight.double(), targets, upstream)
    plain = run(token_log_probs_torch, hidden, weight, targets, upstream)
    found = run(token_log_probs_triton, hidden, weight, targets, upstream, products=products)
    for one, other, truth in zip(found, plain, wanted):
        assert (one.double() - truth).square().mean() <= 1.5**2 * (other.double() - truth).square().mean()
