"""The Triton kernels of kernels/layers_triton.py against the definitions in kernels/layers.py: in
Triton's interpreter, or on a GPU (TEST_ON=gpu, tests/conftest.py)."""

import pytest
import torch

from kernels import layers, layers_triton
from kernels.triton_or_none import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest element: outputs are rounded once or twice, gradients are those of what
# was rounded.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", ERROR, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def run(function, *inputs):
    """The output, and the gradients of the inputs that are wanted, for an upstream gradient that is
    the same for all."""
    leaves = [x.detach().clone() for x in inputs]
    for leaf, x in zip(leaves, inputs):
        leaf.requires_grad_(x.requires_grad)
    out = function(*leaves)
    upstream = random(*out.shape, dtype=torch.float64, seed=7).to(out.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def check(triton, reference, *inputs):
    """Output and gradients against the definition in float64, and the same bits again. Returns the
    output, and the definition's in the inputs' dtypes."""
    found, plain = run(triton, *inputs), run(reference, *inputs)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    for one, other, like in zip(found, run(reference, *doubles), plain, strict=True):
        assert one.dtype == like.dtype and one.shape == like.shape
        error = ERROR[one.dtype] * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, atol=error, rtol=0)
    again = run(triton, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, again))
    return found[0], plain[0]


def share_of_equal(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one == other).double().mean().item()


def check_rms_norm(shape, dtype):
    """The kernel against the definition on random rows."""

    def triton(x, weight):
        return layers_triton.rms_norm_triton(x, weight, 1e-6)

    def reference(x, weight):
        return layers.rms_norm_reference(x, weight, 1e-6)

    x = random(*shape, dtype=dtype).mul_(30).requires_grad_()
    weight = random(shape[-1], dtype=dtype, seed=1).requires_grad_()
    one, other = check(triton, reference, x, weight)
    if dtype != torch.float32:  # a sum in another order rarely moves what is rounded
        assert share_of_equal(one, other) > 0.98


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (2, 1, 200), (17, 64)], ids=str)
def test_rms_norm(shape, dtype):
    check_rms_norm(shape, dtype)


def test_rms_norm_of_many_rows(monkeypatch):
    """Several rows for each program of the backward pass, and fewer for the last."""
    monkeypatch.setattr(layers_triton, "WEIGHT_SUMS", 4)
    check_rms_norm((17, 64), torch.float32)


def test_rms_norm_of_nothing_but_zeros():
    x = torch.zeros(2, 16, device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    assert torch.equal(layers_triton.rms_norm_triton(x, weight, 1e-6), x)


def test_rms_norm_with_a_wider_weight():
    """As under autocast: the result has the wider dtype."""
    x, weight = random(3, 16, dtype=torch.bfloat16), random(16, dtype=torch.float32)
    one = layers_triton.rms_norm_triton(x, weight, 1e-6)
    other = layers.rms_norm_reference(x, weight, 1e-6)
    assert one.dtype == other.dtype == torch.float32
    torch.testing.assert_close(one, other, atol=0.02, rtol=0.01)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (7, 3, 80), (1, 1, 7, 128)], ids=str)
def test_rope(shape, dtype):
    """x [..., tokens, heads, D]. The angles have x's dtype, as in the decoder."""
    x = random(*shape, dtype=dtype).requires_grad_()
    angles = random(*shape[:-2], shape[-1], dtype=torch.float64, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    one, other = check(layers_triton.apply_rope_triton, layers.apply_rope_reference, x, cos, sin)
    assert torch.equal(one, other)  # no product is fused with a sum


def test_rope_of_slices_with_float32_angles():
    """As in the vision tower: q, k and v are slices of one tensor, and angles are float32."""
    qkv = random(5, 3, 2, 16, dtype=torch.bfloat16)
    angles = random(5, 16, dtype=torch.float32)
    for x in qkv.unbind(1):
        one = layers_triton.apply_rope_triton(x, angles.cos(), angles.sin())
        other = layers.apply_rope_reference(x, angles.cos(), angles.sin())
        assert one.dtype == torch.bfloat16 and share_of_equal(one, other) > 0.98
        torch.testing.assert_close(one, other)


def test_rope_of_rows_that_share_their_angles():
    x = random(2, 5, 3, 16, dtype=torch.float32)
    for shape in ((1, 5, 16), (5, 16)):
        cos, sin = (random(*shape, dtype=torch.float32, seed=seed) for seed in (2, 3))
        one = layers_triton.apply_rope_triton(x, cos, sin)
        assert torch.equal(one, layers.apply_rope_reference(x, cos, sin))


@pytest.mark.parametrize("name", ["rms_norm", "apply_rope", "swiglu"])
def test_inputs_and_gradients_that_are_not_contiguous(name):
    """Inputs whose last dimension has a stride; and the gradient of a sum, a single number."""
    x = random(16, 2, 3, dtype=torch.float32).movedim(0, -1)  # [2, 3, 16]
    others = {
        "rms_norm": (random(16, dtype=torch.float32, seed=1), 1e-6),
        "apply_rope": [random(2, 16, dtype=torch.float32, seed=seed) for seed in (1, 2)],
        "swiglu": (x.flip(0),),
    }[name]
    results = []
    kernel, definition = getattr(layers, f"{name}_triton"), getattr(layers, f"{name}_reference")
    for function in (kernel, definition):
        leaf = x.detach().requires_grad_()
        out = function(leaf, *others)
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_rope_keeps_lengths_and_is_undone_by_its_gradient():
    x = random(4, 2, 32, dtype=torch.float32).requires_grad_()
    angles = random(4, 16, dtype=torch.float32).repeat(1, 2)
    out = layers_triton.apply_rope_triton(x, angles.cos(), angles.sin())
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    (back,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(back, x.detach())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 57), (3, 5, 48), (2, 700)], ids=str)
def test_swiglu(shape, dtype):
    gate = random(*shape, dtype=dtype).mul_(4).requires_grad_()
    up = random(*shape, dtype=dtype, seed=1).requires_grad_()
    one, other = check(layers_triton.swiglu_triton, layers.swiglu_reference, gate, up)
    if dtype != torch.float32:  # exp is not the same function to the last bit
        assert share_of_equal(one, other) > 0.98


def test_swiglu_of_extreme_gates():
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4], device=DEVICE).requires_grad_()
    up = torch.full((6,), 2.0, device=DEVICE).requires_grad_()
    one, other = check(layers_triton.swiglu_triton, layers.swiglu_reference, gate, up)
    assert one.isfinite().all() and other.isfinite().all()


def test_who_computes(monkeypatch):
    """KERNELS decides; tensors without elements and float64 are left to the definitions."""
    called = []
    monkeypatch.setattr(layers, "rms_norm_triton", lambda x, *rest: called.append(x) or x)
    x, weight = random(2, 16, dtype=torch.float32), random(16, dtype=torch.float32)
    monkeypatch.setenv("KERNELS", "triton")
    layers.rms_norm(x, weight, 1e-6)
    assert len(called) == 1
    layers.rms_norm(x[:0], weight, 1e-6)
    layers.rms_norm(x.double(), weight.double(), 1e-6)
    monkeypatch.setenv("KERNELS", "reference")
    layers.rms_norm(x, weight, 1e-6)
    assert len(called) == 1
