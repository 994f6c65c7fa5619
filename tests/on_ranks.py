"""Three steps of a stage, as the commands take them, for tests of several processes.

    python tests/on_ranks.py sft|grpo OUT.pt '{"model": ..., "data": ...}'

The first rank writes the whole weights, the gradient norms, the losses, and (GRPO) the responses.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import grpo  # noqa: E402
import sft  # noqa: E402
from data.sequences import batches  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from hub.options import run_command  # noqa: E402
from training import parallel  # noqa: E402
from training.optimizer import load_for_training, make_optimizer  # noqa: E402

STEPS = 3
RATES = {"sft": 2e-4, "grpo": 3e-5}  # the micro recipe's


def sft_steps(values: dict) -> dict:
    steps, fails = values.pop("steps", STEPS), values.pop("fails", None)
    options = sft.SFTOptions(**values)
    rows = sft.load_rows(options, Tokenizer.from_pretrained(options.model))
    model = load_for_training(options)
    optimizer = make_optimizer(model, options)
    stream, metrics = batches(len(rows), options.batch_size, options.seed), []
    for _, (_, chosen) in zip(range(steps), stream):
        batch = [rows[i] for i in chosen]
        if fails == parallel.rank() and metrics:
            raise ValueError(f"a bug of rank {fails}")
        metrics.append(sft.train_step(model, optimizer, batch, RATES["sft"], options))
    return {"metrics": metrics, "weights": dict(parallel.whole_weights(model, torch.float32))}


def grpo_steps(values: dict) -> dict:
    # About half of the responses are right: a rule that the tiny models' noise can be judged by.
    grpo.accuracy_reward = lambda response, *_, **__: sum(map(ord, response)) % 2.0
    options = grpo.GRPOOptions(**values)
    tokenizer = Tokenizer.from_pretrained(options.model)
    questions = grpo.load_questions(options, tokenizer)
    trainer = grpo.Trainer(options, tokenizer)
    stream, metrics, samples = batches(len(questions), 4, options.seed), [], []
    for number, (_, chosen) in zip(range(STEPS), stream):
        found, records = trainer.step([questions[i] for i in chosen], number, RATES["grpo"])
        metrics.append(found)
        samples += records
    weights = dict(parallel.whole_weights(trainer.model, torch.float32))
    return {"metrics": metrics, "samples": samples, "weights": weights}


def main(argv: list[str]) -> None:
    stage, out, values = argv
    options = json.loads(values)
    with parallel.processes(parallel.training_device(options["device"])):
        result = {"sft": sft_steps, "grpo": grpo_steps}[stage](options)
        if parallel.is_first():
            torch.save(result, out)
        parallel.barrier()


if __name__ == "__main__":
    run_command(main)
