"""The Triton kernels of kernels/logprob_triton.py against the reference in float64: in Triton's
interpreter, or on a GPU (TEST_ON=gpu, tests/conftest.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import make_pack, make_row
from hub.options import MICRO_BASE
from kernels import logprob, logprob_triton
from kernels.logprob import token_log_probs_reference, token_log_probs_torch
from kernels.logprob_triton import chunk_width, token_log_probs_triton
from kernels.triton_or_none import AVAILABLE
from model import Qwen2_5_VL, score

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Of log-probs and entropy, in nats; of gradients, relative to the largest (16 bits: those of logits
# are rounded too).
OUTPUT_ERROR = {torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 1e-5}
GRADIENT_ERROR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of ids also in small vocabularies."""
    monkeypatch.setattr(logprob_triton, "LEAST_WIDTH", 256)
    monkeypatch.setattr(logprob_triton, "CHUNK_ELEMENTS", 1)


def inputs(N, C, V, dtype, *, scale=1.0):
    """hidden, weight, targets, and an upstream gradient with zeros and both signs."""
    g = torch.Generator().manual_seed(N + 10 * C + 100 * V)
    hidden = torch.randn((N, C), generator=g, dtype=torch.float64)
    weight = torch.randn((V, C), generator=g, dtype=torch.float64)
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    upstream[1::3] = 0
    targets = torch.randint(0, V, (N,), generator=g)
    hidden = (hidden * scale * C**-0.5).to(dtype)
    return [x.to(DEVICE) for x in (hidden, weight.to(dtype), targets, upstream)]


def run(function, hidden, weight, targets, upstream, **options):
    """log_probs, entropy, and the gradients of hidden and weight."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    log_probs, entropy = function(hidden, weight, targets, **options)
    gradients = torch.autograd.grad(log_probs, (hidden, weight), upstream.to(log_probs.dtype))
    return [log_probs.detach(), entropy, *gradients]


def check(hidden, weight, targets, upstream, **options):
    """Everything against the reference on the same numbers in float64; twice, bit for bit. Returns
    what was found."""
    dtype = hidden.dtype
    doubles = hidden.double(), weight.double()
    wanted = run(token_log_probs_reference, *doubles, targets, upstream, **options)
    found = run(token_log_probs_triton, hidden, weight, targets, upstream, **options)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
    error = OUTPUT_ERROR[dtype]
    for one, other in zip(found[:2], wanted[:2]):
        torch.testing.assert_close(one.double(), other, atol=error, rtol=error)
    for one, other in zip(found[2:], wanted[2:]):
        error = GRADIENT_ERROR[dtype] * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, atol=error, rtol=0)
    again = run(token_log_probs_triton, hidden, weight, targets, upstream, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, again))
    return found


@pytest.mark.parametrize("dtype", OUTPUT_ERROR, ids=str)
@pytest.mark.parametrize(
    "N, C, V", [(1, 64, 300), (7, 24, 129), (15, 32, 65), (16, 40, 256), (65, 64, 257)]
)
def test_outputs_and_gradients(N, C, V, dtype):
    """Tiles that are full, and tiles with a few tokens or ids too many or too few."""
    check(*inputs(N, C, V, dtype))


@pytest.mark.parametrize("dtype", OUTPUT_ERROR, ids=str)
def test_several_chunks_and_tiles(small_chunks, dtype):
    check(*inputs(70, 48, 1300, dtype), temperature=0.5)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature):
    check(*inputs(9, 20, 100, torch.float32), temperature=temperature)


def test_masked_ids(small_chunks):
    """Whole tiles and whole chunks of them; a masked target has log-prob -inf and still pushes the
    others down."""
    hidden, weight, targets, upstream = inputs(9, 20, 700, torch.float32)
    masked_ids = [*range(300), *range(512, 600), 650]
    masked_ids = torch.tensor(masked_ids, device=DEVICE)
    targets = targets % 50 + 300
    targets[2] = 550
    log_probs, entropy, _, d_weight = check(
        hidden, weight, targets, upstream, masked_ids=masked_ids
    )
    assert log_probs[2] == float("-inf") and log_probs[[0, 1, 3]].isfinite().all()
    assert entropy.isfinite().all()
    assert upstream[2] != 0 and not d_weight[masked_ids].any()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_entropy_does_not_cancel(scale):
    """From uniform to all but certain, in float32: logits up to a thousand; entropies of 1e-3 nats
    have 3 digits."""
    hidden, weight, targets, _ = inputs(40, 16, 200, torch.float32, scale=scale)
    wanted = token_log_probs_reference(hidden.double(), weight.double(), targets)[1]
    found = token_log_probs_triton(hidden, weight, targets)[1]
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), wanted, atol=3e-7, rtol=1e-3)


def test_a_target_that_does_not_exist_gives_nan():
    """Not some plausible number; the reference raises, for which a GPU would have to be waited
    for."""
    hidden, weight, targets, _ = inputs(5, 20, 100, torch.float32)
    targets[1], targets[3] = 100, -100
    log_probs, _ = token_log_probs_triton(hidden, weight, targets)
    assert log_probs.isnan().tolist() == [False, True, False, True, False]


def test_sums_over_chunks_are_not_rounded(small_chunks, monkeypatch):
    """In 16 bits, hidden's gradient over 6 chunks is as near to the truth as over one (Liger#1391
    was not)."""
    hidden, weight, targets, upstream = inputs(20, 16, 1500, torch.bfloat16, scale=3.0)
    doubles = hidden.double(), weight.double()
    wanted = run(token_log_probs_reference, *doubles, targets, upstream)[2]
    errors = []
    for width in (256, 4096):
        monkeypatch.setattr(logprob_triton, "LEAST_WIDTH", width)
        found = run(token_log_probs_triton, hidden, weight, targets, upstream)[2]
        errors.append((found.double() - wanted).square().mean().sqrt().item())
    assert errors[0] < 1.02 * errors[1]


def test_only_the_gradients_that_are_needed(monkeypatch):
    """With the head frozen no product is spent on its gradient, and the other way round."""
    hidden, weight, targets, upstream = inputs(9, 20, 100, torch.float32)
    wanted = run(token_log_probs_reference, hidden, weight, targets, upstream)[2:]
    made, original = [], logprob_triton.add_product

    def add_product(out, a, b, *, beta):
        made.append((a.shape[0], b.shape[1]))
        original(out, a, b, beta=beta)

    monkeypatch.setattr(logprob_triton, "add_product", add_product)
    for index, sizes in ((0, (9, 20)), (1, (100, 20))):
        leaves = [hidden.clone(), weight.clone()]
        leaves[index].requires_grad_()
        log_probs, entropy = token_log_probs_triton(*leaves, targets)
        assert not entropy.requires_grad
        made.clear()
        log_probs.backward(upstream.float())
        torch.testing.assert_close(leaves[index].grad, wanted[index], atol=1e-5, rtol=1e-5)
        assert leaves[1 - index].grad is None and {(9, 20), (100, 20)} & set(made) == {sizes}


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


def test_no_tensor_of_all_logits_is_made(small_chunks, monkeypatch):
    """Nothing of N x V values is allocated in either pass, nor kept between them."""
    hidden, weight, targets, upstream = inputs(64, 16, 2000, torch.float32)
    made, saved = [], []

    def recorded(original):
        def function(*args, **options):
            made.append(original(*args, **options))
            return made[-1]

        return function

    def save(tensor):
        saved.append(tensor)
        return tensor

    for name in ("empty", "full", "zeros"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        log_probs, _ = token_log_probs_triton(hidden, weight, targets)
    log_probs.backward(upstream.float())
    assert max(x.numel() for x in made) == 64 * 256 and len(made) >= 2
    assert max(x.numel() for x in saved) <= 2000 * 16


def test_how_the_vocabulary_is_cut():
    """The table at the top of logprob_triton.py, and its limits."""
    assert chunk_width(8192, 3584) == 2048
    assert chunk_width(10**6, 3584) == logprob_triton.LEAST_WIDTH
    assert chunk_width(100, 3584) == 4608


def test_dispatcher(monkeypatch):
    hidden, weight, targets, _ = inputs(5, 20, 100, torch.float32)
    calls = []
    for name in ("reference", "torch", "triton"):
        function = getattr(logprob, f"token_log_probs_{name}")

        def path(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(logprob, f"token_log_probs_{name}", path)

    def first_call(hidden, targets):
        calls.clear()
        logprob.token_log_probs(hidden, weight, targets)
        return calls[0]

    monkeypatch.delenv("KERNELS", raising=False)
    assert first_call(hidden, targets) == ("triton" if GPU else "torch")
    for name, path in (("triton", "triton"), ("sdpa", "torch"), ("reference", "reference")):
        monkeypatch.setenv("KERNELS", name)
        assert first_call(hidden, targets) == path
    monkeypatch.setenv("KERNELS", "triton")
    assert first_call(hidden[:0], targets[:0]) == "triton"
    assert logprob.token_log_probs(hidden[:0], weight, targets[:0])[0].shape == (0,)
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS must be"):
        logprob.token_log_probs(hidden, weight, targets)


def test_without_triton():
    """As on macOS: everything imports, and the PyTorch path computes."""
    code = (
        "import sys; sys.modules['triton'] = None; import os; os.environ['KERNELS'] = 'triton'; "
        "import torch; from kernels import token_log_probs; "
        "ids = torch.zeros(2, dtype=torch.long); "
        "print(token_log_probs(torch.zeros(2, 3), torch.zeros(4, 3), ids)[1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[1.386"), done.stderr


@pytest.mark.parametrize("temperature, masked", [(1.0, None), (0.7, [30, 31, 40])])
def test_a_pack_has_the_same_scores_with_kernels(monkeypatch, temperature, masked):
    """Log-probs, entropies and the gradients of SFT's loss on the micro base, with KERNELS=triton
    and with plain PyTorch; and as GRPO asks, at a temperature and without some ids."""
    model, results = Qwen2_5_VL.from_pretrained(MICRO_BASE).to(DEVICE), []
    model.visual.requires_grad_(False)
    masked_ids = masked and torch.tensor(masked, device=DEVICE)
    pack = make_pack(
        [
            make_row(range(1, 12), [False] * 4 + [True] * 7),
            make_row(range(20, 27), [False] * 3 + [True] * 4),
        ]
    ).to(DEVICE)
    for kernels in ("sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        model.zero_grad()
        scores = score(model, pack, temperature=temperature, masked_ids=masked_ids)
        scores[0].sum().neg().backward()
        parameters = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        results.append({name: p.grad.clone() for name, p in parameters})
        results[-1] |= {"log-probs": scores[0].detach(), "entropy": scores[1]}
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, wanted in results[0].items():
        atol = 1e-5 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(results[1][name], wanted, atol=atol, rtol=1e-4)


@pytest.mark.gpu
def test_gpu_memory_at_full_size():
    """Beyond inputs and gradients, at 8,192 tokens of the 7B's head in bfloat16."""
    hidden = torch.randn(8192, 3584, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(152_064, 3584, device="cuda", dtype=torch.bfloat16) * 0.02
    weight.requires_grad_()
    targets = torch.randint(0, 152_064, (8192,), device="cuda")
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    a @ a  # cuBLAS' own workspace is not ours
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_log_probs_triton(hidden, weight, targets)[0].sum().backward()
    peak = torch.cuda.max_memory_allocated()
    assert peak - before - hidden.nbytes - weight.nbytes < 0.25e9
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_as_near_to_the_truth_as_pytorch(small_chunks):
    """16 bits: not more than 1.5 times plain PyTorch's error against float64; a real head's width
    on a GPU."""
    sizes, dtype = ((40, 200, 900), torch.float16)
    if GPU:
        sizes, dtype = ((700, 3584, 5000), torch.bfloat16)
    hidden, weight, targets, upstream = inputs(*sizes, dtype, scale=3.0)
    doubles = hidden.double(), weight.double()
    wanted = run(token_log_probs_reference, *doubles, targets, upstream)
    plain = run(token_log_probs_torch, hidden, weight, targets, upstream)
    found = run(token_log_probs_triton, hidden, weight, targets, upstream)
    for one, other, truth in zip(found, plain, wanted):
        error = (one.double() - truth).square().mean()
        assert error <= 1.5**2 * (other.double() - truth).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [None, [1, 3]])
def test_no_tokens(dtype, masked):
    """CUDA launches no empty grid: nothing comes out, and the gradients are zeros."""
    hidden, weight, targets, upstream = inputs(0, 16, 300, dtype)
    masked_ids = None if masked is None else torch.tensor(masked, device=DEVICE)
    found = run(token_log_probs_triton, hidden, weight, targets, upstream, masked_ids=masked_ids)
    assert [x.shape for x in found] == [(0,), (0,), (0, 16), (300, 16)]
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[3].dtype == dtype and not found[3].any()
