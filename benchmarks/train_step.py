"""One training step at full size: seconds, and the peak of memory beside the plan's.

    python benchmarks/train_step.py --shape 7b --stage sft
    python benchmarks/train_step.py --shape 3b --stage grpo --prompts 32 --new-tokens 512
    torchrun --nproc_per_node 8 benchmarks/train_step.py --shape 7b --stage grpo

The paper's recipe on random weights and random tokens, with packs as long as they may be; two
steps, of which the second is measured. In GRPO every response gets an advantage at random. The plan
is made for the same options, so its peaks are to be met (training/plan.py). On a CPU there is no
peak to be measured, and the plan is still that of a GPU.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo  # noqa: E402
import sft  # noqa: E402
from benchmarks.common import SHAPES, matmul_flops, random_model, synchronize  # noqa: E402
from data import Example, Prompt, Question, Tokenizer, make_row  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.device import DEVICE_HELP  # noqa: E402
from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402
from hub.weights import copy_side_files  # noqa: E402
from model import Qwen2_5_VL  # noqa: E402
from training import parallel  # noqa: E402
from training.journal import git_commit  # noqa: E402
from training.memory import on_card  # noqa: E402
from training.optimizer import load_for_training, make_optimizer  # noqa: E402
from training.plan import GIB, memory_of_gpu, plan_of, rehearsed, settle  # noqa: E402

STEPS = 2  # the first makes what later ones find: caches, compiled kernels


@dataclass
class TrainStepOptions:
    """Measure one training step of the paper's recipe on random weights."""

    shape: str = option("3b", "of the decoder", choices=SHAPES)
    stage: str = option("sft", "which of the two", choices=("sft", "grpo"))
    packs: int = option(4, "SFT: packs in the batch", low=1)
    prompts: int = option(16, "GRPO: questions in the batch", low=1)
    prompt_tokens: int = option(256, "GRPO: tokens of a question", low=1)
    new_tokens: int = option(512, "GRPO: tokens of a response", low=1)
    pack_tokens: int | None = option(None, "of a pack; None: the recipe's", low=1)
    kl_coef: float = option(1e-2, "GRPO: 0 loads no reference", low=0.0)
    states_on: str = option("auto", "as in training", choices=("auto", "device", "host"))
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("auto", "as in training", choices=("auto", "float32", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object")


def random_ids(count: int, *, seed: int) -> list[int]:
    """Returns ids that every one of the shapes has."""
    return random.Random(seed).choices(range(1000), k=count)


class Watch:
    """Measures pieces of a step: seconds, and the peak of a GPU's memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pieces: dict[str, dict] = {}

    def run(self, name: str, work):
        """Runs a piece, and writes down what it took; of several of one name, the last counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronize(self.device)
        started = time.perf_counter()
        result = work()
        synchronize(self.device)
        piece = {"seconds": time.perf_counter() - started}
        if self.device.type == "cuda":
            piece["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            piece["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        self.pieces[name] = piece
        return result


def measure_sft(options: sft.SFTOptions, packs: int, watch: Watch) -> dict:
    """Takes the steps. Returns how many tokens were trained on, and the last step's metrics."""
    model = load_for_training(options)
    optimizer = make_optimizer(model, options)
    length = max(options.pack_tokens, options.max_length)
    rows = []
    for i in range(packs):
        row = make_row(random_ids(length, seed=i), [True] * length)
        rows.append(row)
    for _ in range(STEPS):
        metrics = watch.run(
            "step", lambda: sft.train_step(model, optimizer, rows, options.learning_rate, options)
        )
    return {"tokens": packs * length, "metrics": metrics}


def measure_grpo(
    options: grpo.GRPOOptions, tokenizer: Tokenizer, prompt_tokens: int, watch: Watch
) -> dict:
    """Takes the steps. Returns the number of tokens in the update's packs, and the last metrics."""
    trainer = grpo.Trainer(options, tokenizer)
    questions = []
    for i in range(options.questions_per_step):
        prompt = Prompt(random_ids(prompt_tokens, seed=i))
        questions.append(Question(Example(str(i), "", ""), prompt))

    # The model's responses are noise: they are judged by a coin, so that there is much to learn.
    coin = random.Random(0)
    grpo.reward = lambda example, response: float(coin.random() < 0.5)
    # Responses share their prompt in a pack: what is run is fewer tokens than they have.
    run, make_packs = [], grpo.make_response_packs

    def counted_packs(*args):
        packs = make_packs(*args)
        run.append(sum(part.pack.input_ids.shape[1] for part in packs))
        return packs

    grpo.make_response_packs = counted_packs
    rollout, update = grpo.rollout, trainer.update
    grpo.rollout = lambda *args, **rest: watch.run("rollout", lambda: rollout(*args, **rest))
    trainer.update = lambda *args: watch.run("update", lambda: update(*args))
    for number in range(STEPS):
        metrics, _ = trainer.step(questions, number, options.learning_rate)
    return {"tokens": run[-1], "metrics": metrics}


def training_options(options: TrainStepOptions, folder: str) -> sft.SFTOptions | grpo.GRPOOptions:
    """Returns the paper's options, for a step of this size."""
    common = {
        "model": folder,
        "device": options.device,
        "dtype": options.dtype,
        "states_on": options.states_on,
    }
    if options.stage == "sft":
        values = sft.RECIPES["paper"] | common
        if options.pack_tokens:
            values |= {"pack_tokens": options.pack_tokens, "max_length": options.pack_tokens}
        return sft.SFTOptions(**values)
    values = grpo.RECIPES["paper"] | common
    if options.pack_tokens:
        values |= {"pack_tokens": options.pack_tokens}
    sizes = {
        "questions_per_step": options.prompts,
        "max_prompt_tokens": options.prompt_tokens,
        "max_new_tokens": options.new_tokens,
        "kl_coef": options.kl_coef,
    }
    return grpo.GRPOOptions(**values | sizes)


def planned(options: sft.SFTOptions | grpo.GRPOOptions, stage: str) -> dict[str, float]:
    """Returns the plan's peaks of these options, in GiB, by phase."""
    module = {"sft": sft, "grpo": grpo}[stage]
    count = parallel.world_size()
    rehearsal = rehearsed(options, module.rehearse, count)
    plan = plan_of(rehearsal, options, count, memory_of_gpu(options))
    return {phase: on_card(peak) / GIB for phase, peak in plan.peaks.items()}


def write_config(folder: str, shape: str) -> None:
    """Writes a model folder's config.json, of which a plan is made."""
    config = SHAPES[shape] | {"torch_dtype": "bfloat16"}
    (Path(folder) / "config.json").write_text(json.dumps(config))


def write_weights(folder: str, shape: str, device: torch.device) -> None:
    """Makes a model folder of it, with random weights in bfloat16."""
    model = random_model(shape, device, torch.bfloat16)
    model.save_pretrained(folder)
    copy_side_files(MICRO_BASE, folder)


def main(argv: list[str]) -> None:
    """Times the steps of the model, and prints the table."""
    options = parse_options(TrainStepOptions, argv)
    device = parallel.training_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        # 1. The plan, before the processes are connected: it connects to others that are not there.
        write_config(folder, options.shape)
        training = training_options(options, folder)
        plan = planned(training, options.stage)
        training = settle(training, {"sft": sft, "grpo": grpo}[options.stage].rehearse)
        # 2. The steps. The first process's folder is that of all: they are on one machine.
        with parallel.processes(device):
            if parallel.is_first():
                write_weights(folder, options.shape, device)
            folder = parallel.exchange({"folder": folder} if parallel.is_first() else {})["folder"]
            training = replace(training, model=folder)
            watch = Watch(device)
            if options.stage == "sft":
                found = measure_sft(training, options.packs, watch)
            else:
                tokenizer = Tokenizer.from_pretrained(folder)
                found = measure_grpo(training, tokenizer, options.prompt_tokens, watch)
            parallel.barrier()
        if parallel.is_first():
            report(options, training, plan, watch, found)


def report(options: TrainStepOptions, training, plan: dict, watch: Watch, found: dict) -> None:
    """Prints the figures, of the first process."""
    with torch.device("meta"):
        model = Qwen2_5_VL(Config.from_dict(SHAPES[options.shape]))
    weights = sum(weight.numel() for weight in model.parameters())
    learning = watch.pieces["step" if options.stage == "sft" else "update"]
    # 2 operations a weight and token in the forward pass, and twice as many in the backward pass.
    # What checkpointing computes twice does not count.
    operations = 6 * weights * found["tokens"] / parallel.world_size()
    rate = operations / learning["seconds"]
    dtype = torch.bfloat16 if watch.device.type == "cuda" else torch.float32
    share = rate / matmul_flops(watch.device, dtype)
    for phase, gib in plan.items():
        print(f"planned   {phase:<24}{gib:8.2f} GiB")
    for name, piece in watch.pieces.items():
        peak = f"{piece['peak_gib']:8.2f} GiB" if "peak_gib" in piece else ""
        print(f"measured  {name:<24}{peak}{piece['seconds']:10.2f} s")
    speed = found["tokens"] / learning["seconds"]
    print(f"{speed:,.0f} tokens/s; {100 * share:.0f}% of the rate of a large matrix product")
    if options.json:
        about = {
            "shape": options.shape,
            "stage": options.stage,
            "states_on": training.states_on,
            "processes": parallel.world_size(),
            "date": str(date.today()),
            "commit": git_commit(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if watch.device.type == "cuda" else "cpu",
        }
        result = {"planned_gib": plan, "measured": watch.pieces, "tokens_per_second": speed}
        print(json.dumps(result | {"share_of_matmul": share, **found} | about))


if __name__ == "__main__":
    run_command(main)
