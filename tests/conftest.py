"""What the tests run on: the CPU, on every machine.

A GPU is hidden, from the tests and from the commands that they start: so `--device auto` is the CPU
everywhere, and Triton's kernels run in its interpreter, on CPU tensors. The environment variable
TEST_ON=gpu leaves the GPU in sight. It is for the tests of the kernels and for those that are
marked `gpu`, as `make gpu` runs them:

    TEST_ON=gpu python -m pytest tests/test_triton_*.py
    TEST_ON=gpu python -m pytest tests -m gpu
"""

import os

import pytest

# Before anything asks torch for a GPU, or imports Triton.
WANTS_GPU = os.environ.get("TEST_ON") == "gpu"
if not WANTS_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that is marked `gpu` where there is none, or none was asked for."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        missing = "torch finds none" if WANTS_GPU else "TEST_ON=gpu asks for it"
        pytest.skip(f"needs a GPU: {missing}")


def teach_the_interpreter_bfloat16() -> None:
    """Corrects two things that Triton's interpreter does with bfloat16, which it holds as 16-bit
    integers: its dot multiplies those, and its conversion from float32 cuts off what does not fit.
    Here the first gets float32, and the second rounds to the nearest, as a GPU does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, x, to):
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, x, to)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        bits = np.where(np.isnan(x.data), 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1))
        return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(a), widened(b), *rest
    )
    InterpreterBuilder.create_fp_trunc = rounded


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        teach_the_interpreter_bfloat16()
    except ImportError:
        pass  # no Triton here: its tests are skipped
