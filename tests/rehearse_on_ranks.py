"""Rehearses a GRPO step with real tensors on one of several processes, for tests/test_plan.py.

    python tests/rehearse_on_ranks.py OUT.json '{"model": ..., ...}'

The first rank writes the peaks of each phase, in bytes by kind.

gloo runs a collective on a thread of its own. This thread lets go of the collective's tensors, and
of a copy that its reduce-scatter makes, only after it has reported the end: on a busy machine long
after, when they count beside those of the next layers. That is chance, and no GPU's: NCCL has no
such thread. So here gloo gets copies that are not counted. All that the training code and FSDP2
make is counted, for as long as they keep it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._C._distributed_c10d import FakeWork  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter, tree_map_only  # noqa: E402

import grpo  # noqa: E402
from hub.options import run_command  # noqa: E402
from training import parallel  # noqa: E402
from training.rehearsal import Rehearsal, pretence  # noqa: E402

functional = torch.ops._c10d_functional  # DTensor's collectives


class CollectivesOnCopies(TorchDispatchMode):
    """Runs every collective to its end, on copies of its tensors, and copies its results back.

    It goes around a Memory, which sees an operation first: what is made here, is not counted.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "c10d":
            return self.fill(func, args, kwargs or {})
        if func in (functional.all_gather_into_tensor.default, functional.all_reduce.default):
            return self.make(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def fill(self, func, args, kwargs):
        """A collective of torch.distributed (FSDP2's are) fills tensors that it is given. It
        returns them, and a handle to wait for: here of something that is done."""
        originals = {}

        def copy(tensor: Tensor) -> Tensor:
            copied = tensor.clone()
            originals[copied] = tensor
            return copied

        *filled, work = func(*tree_map_only(Tensor, copy, args), **kwargs)
        work.wait()
        for tensor in tree_iter(filled):
            originals[tensor].copy_(tensor)
        return *tree_map_only(Tensor, originals.get, filled), FakeWork().boxed()

    def make(self, func, args, kwargs):
        """A collective of DTensor returns a tensor of its own, which is to be waited for."""
        made = func(*tree_map_only(Tensor, torch.clone, args), **kwargs)
        return functional.wait_tensor(made).clone()


def main(argv: list[str]) -> None:
    out, values = argv
    options = grpo.GRPOOptions(**json.loads(values))
    rehearsal = Rehearsal()
    # As a command does it: first the plan, then the processes that it pretended to be.
    with pretence(parallel.world_size()):
        pass
    with parallel.processes(parallel.training_device(options.device)):
        with CollectivesOnCopies(), rehearsal.memory:
            grpo.rehearse(options, rehearsal)
        if parallel.is_first():
            Path(out).write_text(json.dumps(rehearsal.memory.peaks))
        parallel.barrier()


if __name__ == "__main__":
    run_command(main)  # it ends a rank without Python's clean-up, which gloo's threads may abort
