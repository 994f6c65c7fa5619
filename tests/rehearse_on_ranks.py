"""Rehearses a GRPO step with real tensors on one of several processes, for tests/test_plan.py.

    python tests/rehearse_on_ranks.py OUT.json '{"model": ..., ...}'

The first rank writes the peaks of each phase, in bytes by kind.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo  # noqa: E402
from hub.options import run_command  # noqa: E402
from training import parallel  # noqa: E402
from training.rehearsal import Rehearsal, pretence  # noqa: E402


def main(argv: list[str]) -> None:
    out, values = argv
    options = grpo.GRPOOptions(**json.loads(values))
    rehearsal = Rehearsal()
    # As a command does it: first the plan, then the processes that it pretended to be.
    with pretence(parallel.world_size()):
        pass
    with parallel.processes(parallel.training_device(options.device)):
        with rehearsal.memory:
            grpo.rehearse(options, rehearsal)
        if parallel.is_first():
            Path(out).write_text(json.dumps(rehearsal.memory.peaks))
        parallel.barrier()


if __name__ == "__main__":
    run_command(main)  # it ends a rank without Python's clean-up, which gloo's threads may abort
