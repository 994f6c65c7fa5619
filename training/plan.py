"""The memory plan: does a run fit, on how many GPUs, and what is the most it takes of each?

    python grpo.py --recipe paper --model Qwen2.5-VL-7B-Instruct --plan
    python sft.py --recipe paper --model Qwen2.5-VL-72B-Instruct --plan --gpus 8 --gpu-gib 80

Of the model folder only config.json is read (and where --max-prompt-tokens is None the tokenizer,
for the longest question of the data, if both are there). The plan is no formula: a step of the real
code runs on tensors without contents (training/rehearsal.py), and what it makes is counted. On a
GPU both commands do this before anything is loaded, and refuse what cannot fit. --gpu-gib overrules
what the card says of itself.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hub.errors import InputError
from model import slots_that_fit
from training.memory import HOST, on_card
from training.options import TrainOptions, disk_needed
from training.parallel import is_first, training_device, world_size
from training.rehearsal import (
    KINDS,
    KV_CACHE,
    OPTIMIZER,
    PHASES,
    ROLLOUT,
    STATES,
    Rehearsal,
    pretence,
)

GIB = 2**30
# What no tensor shows: the CUDA context, buffers of NCCL, workspaces of cuBLAS, CUDA graphs, and
# the gaps that the allocator leaves. On an H200 torch held 1.1 to 2.2 GiB more than was planned
# (docs/results.md), and the context some 0.5; NCCL's part has not been seen yet.
RESERVE = 4 * GIB
DEFAULT_GIB = 80  # of a GPU that is not there
NOTHING = "none of 2, 4 or 8 GPUs, --states-on host, and shorter packs"

Rehearse = Callable[[TrainOptions, Rehearsal], None]  # sft.rehearse, grpo.rehearse


@dataclass
class Plan:
    """What a step takes of one of `num_gpus` GPUs, in bytes.

    peaks: for each phase, the bytes by kind at the moment when they are most. A rollout's KV cache
    has as many slots as fit; slots, wanted_slots and slot_bytes are 0 where there is no rollout.
    """

    options: TrainOptions  # as they were rehearsed, with --states-on auto decided
    num_gpus: int
    gpu_bytes: int  # of one GPU
    peaks: dict[str, dict[str, int]]
    slots: int
    wanted_slots: int  # more have no use
    slot_bytes: int
    rehearsal: Rehearsal

    def needed(self, phase: str) -> int:
        """Returns the least that a phase can do with: a rollout with a single slot."""
        needed = on_card(self.peaks[phase])
        if phase == ROLLOUT:
            needed += self.slot_bytes - self.peaks[phase][KV_CACHE]
        return needed

    @property
    def fullest_phase(self) -> str:
        """Returns the phase that needs the most."""
        return max(self.peaks, key=self.needed)

    @property
    def fits(self) -> bool:
        """Returns whether all phases fit."""
        return self.needed(self.fullest_phase) + RESERVE <= self.gpu_bytes

    @property
    def host_bytes(self) -> int:
        """Returns what each process keeps in the host's memory."""
        return max(peak.get(HOST, 0) for peak in self.peaks.values())

    def verdict(self) -> str:
        """Returns what is needed, and what is there, as a sentence without its end."""
        needed = self.needed(self.fullest_phase) / GIB
        single = " with a single slot" if self.fullest_phase == ROLLOUT else ""
        return (
            f"{self.fullest_phase} needs {needed:.1f} GiB{single}, and {RESERVE // GIB} more are "
            f"set aside for CUDA, NCCL and gaps; a GPU has {self.gpu_bytes / GIB:.1f}"
        )


# --- How it is made -----------------------------------------------------------------------------


def rehearsed(options: TrainOptions, rehearse: Rehearse, num_gpus: int) -> Rehearsal:
    """Rehearses a step on tensors without contents. Returns what was seen."""
    rehearsal = Rehearsal()
    with pretence(num_gpus), rehearsal.memory:
        rehearse(gpu_options(options), rehearsal)
    return rehearsal


def gpu_options(options: TrainOptions) -> TrainOptions:
    """Returns the options as a GPU takes them. The tensors say that they are on the CPU, where auto
    would be another precision."""
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    return replace(options, device="cpu", dtype=dtype)


def plan_of(rehearsal: Rehearsal, options: TrainOptions, num_gpus: int, gpu_bytes: int) -> Plan:
    """Returns the plan for GPUs of this size. --states-on auto becomes the device, or the host
    where the states do not fit a single GPU (and are compact: in bfloat16)."""
    options = gpu_options(options)
    on_device = replace(options, states_on="device")
    if num_gpus > 1 or options.dtype != "bfloat16":
        return fill(rehearsal, on_device, num_gpus, gpu_bytes)
    if options.states_on == "auto":
        plan = fill(rehearsal, on_device, num_gpus, gpu_bytes)
        if plan.fits:
            return plan
        options = replace(options, states_on="host")
    return fill(rehearsal, options, num_gpus, gpu_bytes)


def fill(rehearsal: Rehearsal, options: TrainOptions, num_gpus: int, gpu_bytes: int) -> Plan:
    """Returns the plan with the states where the options say, and as many slots as then fit."""
    seen = rehearsal.memory.peaks
    peaks = {phase: dict(seen[phase]) for phase in PHASES if phase in seen}
    # On the host they are the same tensors, elsewhere. (A step brings them to the GPU in chunks of
    # some 0.1 GiB, which are left to the reserve.)
    if options.states_on == "host":
        for peak in peaks.values():
            peak[HOST] = peak.get(HOST, 0) + peak.pop(STATES)

    slots = slot_bytes = 0
    if rehearsal.slots:
        rollout = peaks[ROLLOUT]
        slot_bytes = rollout[KV_CACHE] // rehearsal.slots
        left = gpu_bytes - RESERVE - (on_card(rollout) - rollout[KV_CACHE])
        slots = slots_that_fit(left, slot_bytes, rehearsal.slots)
        rollout[KV_CACHE] = slots * slot_bytes
    return Plan(
        options=options,
        num_gpus=num_gpus,
        gpu_bytes=gpu_bytes,
        peaks=peaks,
        slots=slots,
        wanted_slots=rehearsal.slots,
        slot_bytes=slot_bytes,
        rehearsal=rehearsal,
    )


def remedies(plan: Plan, rehearse: Rehearse) -> list[str]:
    """Returns what would make a plan fit. Each has been tried by a plan of its own."""
    options = plan.options
    helpful = []

    def fits(num_gpus: int, **changes) -> bool:
        changed = replace(options, **changes)
        rehearsal = rehearsed(changed, rehearse, num_gpus)
        return plan_of(rehearsal, changed, num_gpus, plan.gpu_bytes).fits

    # 1. More GPUs: the fewest that do. Weights, gradients and states are spread over them.
    standing = plan.needed(OPTIMIZER)
    for count in (2, 4, 8):
        hopeless = standing * plan.num_gpus > count * plan.gpu_bytes
        if count > plan.num_gpus and not hopeless and fits(count):
            helpful.append(f"{count} GPUs (torchrun --nproc_per_node {count})")
            break

    # 2. The states elsewhere.
    compact = plan.num_gpus == 1 and options.dtype == "bfloat16"
    if compact and options.states_on == "device":
        if plan_of(plan.rehearsal, replace(options, states_on="host"), 1, plan.gpu_bytes).fits:
            helpful.append("--states-on host")

    # 3. Shorter packs (as long as the longest row) and responses, which take fewer activations.
    if standing + RESERVE <= plan.gpu_bytes:
        if fits(plan.num_gpus, pack_tokens=1):
            helpful.append("a lower --pack-tokens")
        elif hasattr(options, "max_new_tokens"):
            half = options.max_new_tokens // 2
            if half and fits(plan.num_gpus, max_new_tokens=half, pack_tokens=1):
                helpful.append(f"--max-new-tokens {half} and a lower --pack-tokens")
    return helpful


# --- What it says -------------------------------------------------------------------------------


def table(plan: Plan) -> list[str]:
    """Returns the lines of a table of all phases, in GiB of each GPU."""
    kinds = [kind for kind in KINDS if any(peak.get(kind) for peak in plan.peaks.values())]
    width = max(map(len, plan.peaks))
    lines = ["  ".join([f"{'GiB':{width}}", *kinds, "  total"])]
    for phase, peak in plan.peaks.items():
        cells = [f"{peak.get(kind, 0) / GIB:{len(kind)}.2f}" for kind in kinds]
        lines.append("  ".join([f"{phase:{width}}", *cells, f"{on_card(peak) / GIB:7.2f}"]))
    return lines


def describe(plan: Plan) -> str:
    """Returns the plan as text."""
    options, rehearsal = plan.options, plan.rehearsal
    gpus = "1 GPU" if plan.num_gpus == 1 else f"each of {plan.num_gpus} GPUs"
    checkpoint, saved = rehearsal.checkpoint_bytes / 1e9, rehearsal.model_bytes / 1e9
    disk = disk_needed(options, rehearsal.checkpoint_bytes, rehearsal.model_bytes) / 1e9
    on_host, saving = plan.host_bytes / GIB, rehearsal.model_bytes / GIB
    lines = [f"{options.model} on {gpus}: planned, not measured", "", *table(plan), ""]
    lines.append(f"{'It fits' if plan.fits else 'It does not fit'}: {plan.verdict()}.")
    if plan.wanted_slots:
        lines.append(
            f"KV cache: {plan.slots} slots of {plan.slot_bytes / GIB:.2f} GiB fit; "
            f"{plan.wanted_slots} are of use."
        )
    if plan.num_gpus == 1 and options.dtype == "bfloat16":
        lines.append(
            f"The optimiser's states are on the {options.states_on} (--states-on; auto is the "
            "device where they fit, which is faster)."
        )
    lines += [
        f"Host: {on_host:.1f} GiB for each process, and {saving:.1f} for the first one while it "
        "saves model/.",
        f"Disk: {disk:.1f} GB: a checkpoint has {checkpoint:.1f} (--keep {options.keep}, and the "
        f"next one), model/ {saved:.1f} (and best/ as much; twice, while it is replaced).",
        "other: activations, logits, temporary tensors, and layers while they are put together.",
        f"Assumed: {options.dtype}; {'; '.join(rehearsal.assumed)}.",
    ]
    return "\n".join(lines)


# --- What the commands ask ----------------------------------------------------------------------


def memory_of_gpu(options: TrainOptions) -> int:
    """Returns the bytes of --gpu-gib, or of this machine's GPU, or of a common one."""
    if options.gpu_gib is not None:
        return int(options.gpu_gib * GIB)
    if torch.cuda.is_available():
        device = training_device(options.device)
        return torch.cuda.get_device_properties(device).total_memory
    return DEFAULT_GIB * GIB


def print_plan(options: TrainOptions, rehearse: Rehearse) -> None:
    """Prints the plan of --plan; where it does not fit, with what would help, and exit code 1."""
    if not is_first():
        return
    num_gpus = options.gpus or world_size()
    rehearsal = rehearsed(options, rehearse, num_gpus)
    plan = plan_of(rehearsal, options, num_gpus, memory_of_gpu(options))
    print(describe(plan))
    if not plan.fits:
        print(f"What would help: {', or '.join(remedies(plan, rehearse)) or NOTHING}.")
        sys.exit(1)


def settle(options: TrainOptions, rehearse: Rehearse) -> TrainOptions:
    """Returns the options for a run on this machine's GPUs, with --states-on auto decided.

    On a CPU they stay as they are. Raises InputError for what cannot fit, on GPUs or host.
    """
    if training_device(options.device).type != "cuda":
        return options
    rehearsal = rehearsed(options, rehearse, world_size())
    plan = plan_of(rehearsal, options, world_size(), memory_of_gpu(options))
    if not plan.fits:
        helpful = ", or ".join(remedies(plan, rehearse)) or NOTHING
        raise InputError(
            f"this does not fit: {plan.verdict()}; what would help: {helpful} (--plan shows more)"
        )
    on_host = (plan.host_bytes * world_size()) + rehearsal.model_bytes
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if on_host > there:
        raise InputError(
            f"this does not fit: the host needs {on_host / GIB:.1f} GiB (--plan shows more), "
            f"and has {there / GIB:.1f}"
        )
    return replace(options, states_on=plan.options.states_on)
