"""The peer of benchmarks/sft.py: a plain training loop of transformers and AdamW, at its best.

Runs in an environment of its own, with torch and transformers only. Reads one JSON object (`Job`)
from stdin, and prints one per batch size: the seconds of each step but the first, and all losses.
"""

import json
import sys
import time
from dataclasses import dataclass

import torch

try:
    import transformers
    from transformers import AutoModelForCausalLM
except ImportError:
    sys.exit("this environment has no transformers: pip install torch transformers")


@dataclass
class Job:
    """What is to be measured."""

    model: str  # model folder
    rows: list[list[int]]  # the ids of each row
    scored: list[list[bool]]  # and which of them the loss is about
    batches: list[int]  # numbers of rows in a forward pass, to be tried
    steps: int  # behind one to warm up
    learning_rate: float
    max_grad_norm: float
    threads: int


def padded_batches(job: Job, size: int) -> list[dict[str, torch.Tensor]]:
    """Returns the rows in batches of like length, padded on the right."""
    order = sorted(range(len(job.rows)), key=lambda i: len(job.rows[i]))
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = max(len(job.rows[i]) for i in chosen)
        input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
        attention_mask = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full((len(chosen), width), -100)  # no loss there
        for row, i in enumerate(chosen):
            ids = torch.tensor(job.rows[i])
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = ids.masked_fill(~torch.tensor(job.scored[i]), -100)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batches.append(batch)
    return batches


def train(job: Job, size: int) -> dict:
    """Takes the steps with so many rows in a forward pass."""
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa", use_cache=False
    )
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, weight_decay=0.0, fused=True
    )
    num_tokens = sum(map(sum, job.scored))
    seconds, busy, losses = [], [], []
    for _ in range(1 + job.steps):
        started, worked = time.perf_counter(), time.process_time()
        total = 0.0
        for batch in padded_batches(job, size):
            # The mean is over the scored tokens of all batches together.
            loss = model(**batch, num_items_in_batch=num_tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
        losses.append(total)
    return {"batch": size, "seconds": seconds[1:], "busy": busy[1:], "losses": losses}


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    for size in job.batches:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        print(json.dumps(train(job, size) | versions), flush=True)


if __name__ == "__main__":
    main()
