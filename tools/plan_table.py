"""Prints the README's table of what fits where, by the memory plan (training/plan.py).

    python tools/plan_table.py [--models 3B 7B] [--gpus 1 2]

Each row is a model, each column a number of GPUs and their size. A cell has the GiB that the
fullest phase of the paper's recipe needs of a GPU, in SFT / in GRPO, and in brackets how many
slots the KV cache has then; `no (GiB)` where it does not fit, and `host` where the optimiser's
states must be on the host. It is planned, not measured. No model folder is needed: the published
shapes stand here. All of it takes half an hour on a CPU.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo  # noqa: E402
import sft  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402
from training.plan import GIB, Plan, plan_of, rehearsed  # noqa: E402

# What the published models have in common, of what Config reads.
COMMON = {
    "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 128000,
    "torch_dtype": "bfloat16",
    "image_token_id": 151655,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
# Width, layers, heads, key/value heads, width of the MLP, vocabulary rows, tied head; and the width
# of the vision tower's MLP.
SHAPES = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}
STAGES = {"SFT": (sft, sft.SFTOptions), "GRPO": (grpo, grpo.GRPOOptions)}
SIZES = {1: (24, 80), 2: (80,), 4: (80,), 8: (80,)}  # GiB of a GPU, by how many there are


@dataclass
class Options:
    """Print what fits where, as a Markdown table."""

    models: list[str] = option(list(SHAPES), "which of them")
    gpus: list[str] = option([str(count) for count in SIZES], "how many GPUs")


def config_of(name: str) -> dict:
    """Returns the object of a published model's config.json."""
    width, layers, heads, kv_heads, mlp, rows, tied, tower_mlp = SHAPES[name]
    return COMMON | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "vision_config": {
            "hidden_size": 1280,
            "out_hidden_size": width,
            "intermediate_size": tower_mlp,
        },
    }


def describe(plan: Plan) -> str:
    """Returns what the table says of a plan."""
    text = f"{plan.needed(plan.fullest_phase) / GIB:.0f}"
    if not plan.fits:
        return f"no ({text})"
    if plan.options.states_on == "host":
        text += ", host"
    if plan.wanted_slots:
        text += f" ({plan.slots})"
    return text


def columns_of(stage: str, model: str, gpus: list[int]) -> list[str]:
    """Returns what a stage takes, column by column."""
    module, options_class = STAGES[stage]
    options = options_class(model=model, **module.RECIPES["paper"])
    found = []
    for count in gpus:
        rehearsal = rehearsed(options, module.rehearse, count)
        for size in SIZES[count]:
            found.append(describe(plan_of(rehearsal, options, count, size * GIB)))
    return found


def main(argv: list[str]) -> None:
    """Plans model by model, and prints each row as soon as it is there."""
    options = parse_options(Options, argv)
    for name in options.models:
        if name not in SHAPES:
            raise InputError(f"--models {name}: there is {', '.join(SHAPES)}")
    for count in options.gpus:
        if count not in map(str, SIZES):
            raise InputError(f"--gpus {count}: there is {', '.join(map(str, SIZES))}")
    gpus = [int(count) for count in options.gpus]
    columns = [f"{count} x {size} GB" for count in gpus for size in SIZES[count]]
    print(f"| SFT / GRPO (slots) | {' | '.join(columns)} |")
    print(f"| --- | {' | '.join('---' for _ in columns)} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            (Path(folder) / "config.json").write_text(json.dumps(config_of(name)))
            stages = [columns_of(stage, folder, gpus) for stage in STAGES]
            cells = [" / ".join(pair) for pair in zip(*stages)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
