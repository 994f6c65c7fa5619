"""The peer of benchmarks/grpo.py: TRL's GRPOTrainer at its best.

Runs in an environment of its own, with torch, transformers and trl; of this repository it takes the
reward alone. Reads one JSON object (`Job`) from stdin, and prints one per batch size: the figures
of each step but the first, and the first time the loss of the given batch.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import transformers
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    sys.exit(f"this environment has no {error.name}: pip install torch trl")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import accuracy_reward  # noqa: E402

STOPS = ("<|im_end|>", "<|endoftext|>")
NEVER = "<|video_pad|>"  # a token that no text holds


@dataclass
class Job:
    """What is to be measured. The lists are by question, `given` by response."""

    model: str  # model folder
    prompts: list[list[int]]
    texts: list[str]  # the same as text, which TRL tokenises
    truths: list[list[str]]
    choices: list[dict | None]
    precisions: list[int | None]
    bonus: float  # on the reward of every second response of a group
    endless: bool  # nothing ends a response but its length
    group_size: int
    new_tokens: int
    clip_eps_low: float
    clip_eps_high: float
    max_grad_norm: float
    learning_rate: float
    batches: list[int]  # rows in a forward pass of the update, to be tried
    steps: int  # behind one to warm up
    given: list[dict]  # prompt, completion, advantage, old_log_probs
    threads: int


class Watch(TrainerCallback):
    """Measures the steps, and the sampling and rewarding in them."""

    def __init__(self, trainer: GRPOTrainer):
        self.taken = {"seconds": [], "busy": [], "rollout_seconds": [], "tokens": []}
        self.generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.timed_rollout

    def timed_rollout(self, inputs: list[dict]) -> dict:
        started = time.perf_counter()
        output = self.generate(inputs)
        self.taken["rollout_seconds"].append(time.perf_counter() - started)
        self.taken["tokens"].append(int(output["completion_mask"].sum()))
        return output

    def on_step_begin(self, args, state, control, **rest) -> None:
        self.started, self.worked = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **rest) -> None:
        self.taken["seconds"].append(time.perf_counter() - self.started)
        self.taken["busy"].append(time.process_time() - self.worked)


def make_reward(job: Job, means: list[float]) -> Callable:
    """Returns the reward of the responses of a step, which writes down their mean."""

    def reward(completions: list[str], number: list[int], **rest) -> list[float]:
        values = []
        for i, (text, question) in enumerate(zip(completions, number)):
            options, precision = job.choices[question], job.precisions[question]
            value = accuracy_reward(text, job.truths[question], options, precision=precision)
            values.append(value + job.bonus * (i % 2))
        means.append(sum(values) / len(values))
        return values

    return reward


def make_trainer(job: Job, batch: int, folder: str, reward: Callable) -> GRPOTrainer:
    """Returns the trainer, with `batch` rows in a forward pass of the update."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job.model) / "tokenizer.json"),
        eos_token=NEVER if job.endless else STOPS[0],
        pad_token=STOPS[1],
    )
    if tokenizer(text=job.texts)["input_ids"] != job.prompts:
        sys.exit("transformers turns the prompts into other ids")
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    # No penalties and no stops but these, whatever the folder says.
    stop_ids = [] if job.endless else tokenizer.convert_tokens_to_ids(list(STOPS))
    model.generation_config = GenerationConfig(eos_token_id=stop_ids or None)

    responses = len(job.prompts) * job.group_size
    config = GRPOConfig(
        output_dir=folder,
        max_steps=1 + job.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=responses // batch,
        num_generations=job.group_size,
        max_completion_length=job.new_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=job.clip_eps_low,
        epsilon_high=job.clip_eps_high,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=job.max_grad_norm,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"prompt": text, "number": i} for i, text in enumerate(job.texts)]
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def padded(rows: list[list], value: float, *, left: bool) -> torch.Tensor:
    """Returns the rows as one tensor, padded on one side."""
    width = max(map(len, rows))
    filled = []
    for row in rows:
        padding = [value] * (width - len(row))
        filled.append(padding + row if left else row + padding)
    return torch.tensor(filled)


def loss_of_given(trainer: GRPOTrainer, given: list[dict]) -> dict:
    """Returns the loss of the given batch, in one forward pass, and the norm of its gradient."""
    prompts, completions = ([row[name] for row in given] for name in ("prompt", "completion"))
    inputs = {
        "prompt_ids": padded(prompts, 0, left=True),
        "prompt_mask": padded([[1] * len(row) for row in prompts], 0, left=True),
        "completion_ids": padded(completions, 0, left=False),
        "completion_mask": padded([[1] * len(row) for row in completions], 0, left=False),
        "advantages": torch.tensor([row["advantage"] for row in given]),
        "old_per_token_logps": padded([row["old_log_probs"] for row in given], 0.0, left=False),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    model = trainer.model.eval()  # one batch, not a part of a step that is accumulated
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    model.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "grad_norm": norm.item()}


def train(job: Job, batch: int) -> dict:
    """Takes the steps, and before them the loss of what is given."""
    with tempfile.TemporaryDirectory() as folder:
        means = []
        trainer = make_trainer(job, batch, folder, make_reward(job, means))
        given = loss_of_given(trainer, job.given) if job.given else None
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    watch.taken["rewards"] = means
    figures = {name: values[1:] for name, values in watch.taken.items()}
    return {"batch": batch, "given": given, **figures}


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    for batch in job.batches:
        with redirect_stdout(sys.stderr):  # the trainer prints a summary
            found = train(job, batch)
        job.given = []
        versions = {"trl": trl.__version__, "transformers": transformers.__version__}
        print(json.dumps(found | versions | {"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
