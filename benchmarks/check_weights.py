"""Do released weights do here what they do in transformers? One command, one line of verdict.

    python benchmarks/check_weights.py Qwen2.5-VL-3B-Instruct      # transformers, if it is here
    python benchmarks/check_weights.py Qwen2.5-VL-3B-Instruct --peer PEER/bin/python
    python benchmarks/check_weights.py Qwen2.5-VL-7B-Instruct --device cuda --json check.json

For whoever has a folder of Qwen2.5-VL, X-Reasoner or a text-only Qwen2.5, and would confirm or
refute us: send us the paragraph that is printed before the verdict. The peer's environment is made
by `python -m venv PEER && PEER/bin/pip install torch transformers pillow`; transformers 4.57 and
5.24 were tried. It gets the memory after us, not beside us.

What is looked at: every tensor's name and shape; the ids of a text, those of a conversation by the
folder's own template, and the patches of a picture; the logits of that text and of a question about
that picture; and the loss of one SFT example. The picture is drawn by a formula.

CONFIRMED (exit code 0): all that could be compared agrees. REFUTED (1): something does not, or a
tensor is missing, unexpected, misshapen or not finite. PLAUSIBLE (0): there was no transformers to
compare with, but all tensors are right, and the model knows English; read its answers. A folder
that cannot be read at all is an error in one line (2). The comparison judges our code: of weights
that were damaged before, both programs say the same.

The bounds lie between what two right programs differ by and what a mistake does. Both were measured
on a real 0.5B (Qwen2.5-Coder-0.5B-Instruct, a CPU, torch 2.13, transformers 5.24):

* float32: no logit differs by more than 0.002, no loss by more than 0.0001. transformers' two ways
  to attend (eager, sdpa) differ by 0.00002. A rope_theta that is wrong by 1% makes 0.014, an
  epsilon of 1e-5 for 1e-6 0.36, one missing bias 0.72.
* bfloat16: here right programs differ in every logit (those two ways by 0.5), so distributions are
  compared: the mean of KL(transformers || ours) is below 0.005 nats, the likeliest token the same
  at 90% of the places, and no loss differs by more than 0.02. Those two ways have a mean KL of
  0.001, and 97%. Rope pairs that are wrong in one layer of 24 make 0.015; a wrong epsilon (0.001)
  or a missing bias (0.002) is not seen: take --dtype float32 where it fits (3B: 15 GB, 7B: 33 GB).
* Patches differ by at most 0.02: transformers may resize with torchvision, which rounds otherwise
  than PIL. Ids are equal.
* A model knows English if the text's mean loss is below half of ln V, that of a blind guess, and
  below 1 nat where the text comes again. This 0.5B has 3.2 (of 11.9) and 0.20. With rope pairs that
  are wrong in all layers it copies with 4.4; with rows of the embedding in disorder the text has
  9.4. What is wrong in one layer only is not seen: that takes transformers.
"""

import gc
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.agreement import (  # noqa: E402
    ask_for_logits,
    compare_logits,
    find_faults,
    find_peer,
    machine,
    peak_bytes,
    what_was_compared,
)
from benchmarks.check_inputs import (  # noqa: E402
    ASKED,
    ASKED_OF_PICTURE,
    PASSAGE,
    TEXT,
    Inputs,
    conversation,
    draw_picture,
    make_inputs,
)
from benchmarks.common import SHAPES, synchronize  # noqa: E402
from data import ImageConfig, Tokenizer, check_vocabulary, make_pack, make_row  # noqa: E402
from data.completions import SamplingParams  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.device import DEVICE_HELP, DTYPES, in_gib, limit_threads, memory_phase, pick_device  # noqa
from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402
from hub.weights import (  # noqa: E402
    assigned,
    check_not_quantised,
    opened,
    published_name,
    read_index,
    weight_files,
)
from model import Qwen2_5_VL  # noqa: E402
from sample import Sampler  # noqa: E402
from sft import sft_loss  # noqa: E402
from training.journal import git_commit  # noqa: E402

MAX_COPY_LOSS = 1.0  # nats; the other bounds stand in agreement.py


@dataclass
class CheckOptions:
    """Do released weights do here what they do in transformers?"""

    folder: str = option(None, "model folder", positional=True)
    peer: str = option("auto", "Python with transformers; auto: this one, if it has it; or none")
    new_tokens: int = option(48, "of each greedy answer, at most", low=1)
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on a GPU, else float32", choices=DTYPES
    )
    json: str | None = option(None, "a file for all figures")


# --- What the folder is ---


def describe(folder: Path, config: Config) -> dict:
    """Returns what a folder is, by its config and by the headers of its weights.

    Raises InputError for weights that cannot be read or are quantised.
    """
    # 1. All names that are there, and which of them count.
    index, files = read_index(folder), weight_files(folder)
    check_not_quantised(files, index)
    shapes, dtypes, ignored = {}, Counter(), []
    for path in files:
        with opened(path) as file:
            kept = set(assigned(file, path, index))
            ignored += [key for key in file.keys() if key not in kept]
            for key in kept:
                tensor = file.get_slice(key)
                shapes[published_name(key)] = tensor.get_shape()
                dtypes[tensor.get_dtype()] += 1

    # 2. Beside those that the model needs.
    with torch.device("meta"):
        expected = Qwen2_5_VL(config).state_dict()
    known = [name for name, shape in SHAPES.items() if fits(config, shape)]
    return {
        "folder": folder.resolve().name,
        "type": "qwen2_5_vl" if config.vision is not None else "qwen2",
        "decoder": known[0] if known else None,
        "parameters": sum(tensor.numel() for tensor in expected.values()),
        "dtypes": dict(dtypes),
        "tied": config.tie_word_embeddings,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "tensors_expected": len(expected),
        "tensors_right": sum(
            shapes.get(name) == list(tensor.shape) for name, tensor in expected.items()
        ),
        "tensors_more": sorted(set(shapes) - set(expected)),  # a tied head, or else an error
        "tensors_ignored": sorted(ignored),
    }


def fits(config: Config, shape: dict) -> bool:
    """Returns whether a config's decoder has one of the shapes of benchmarks/common.py."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    return all(getattr(config, name) == shape[name] for name in names)


def print_description(about: dict, tokenizer: Tokenizer, config: Config, images) -> None:
    """Prints what the folder is: model, tensors, tokenizer, image settings."""
    decoder = f", the decoder of the {about['decoder']}" if about["decoder"] else ""
    tied = "tied" if about["tied"] else "separate"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in about["dtypes"].items())
    ignored = ", ".join(about["tensors_ignored"][:3]) or "none"
    print(f"folder     {about['folder']}: {about['type']}{decoder}", end=", ")
    print(f"{about['parameters']:,} parameters")
    print(f"weights    {about['files']} file(s), {in_gib(about['bytes'])}; {dtypes}; head {tied}")
    right, expected = about["tensors_right"], about["tensors_expected"]
    print(f"tensors    {right} of {expected} there with their shapes; beside them", end=" ")
    more = len(about["tensors_more"])
    print(f"{more} more, {len(about['tensors_ignored'])} ignored ({ignored})")
    print(
        f"tokenizer  ids up to {tokenizer.vocab_size - 1}, {config.vocab_size} rows of vocabulary",
        end="",
    )
    print(f"; stops at {' and '.join(map(str, tokenizer.stop_ids))}")
    if images is not None:
        print(f"images     of {images.min_pixels:,} to {images.max_pixels:,} pixels")


# --- What it computes ---


@torch.no_grad()
def run_ours(model: Qwen2_5_VL, tokenizer: Tokenizer, inputs: Inputs, new_tokens: int) -> dict:
    """Returns logits on the host, losses, greedy answers, and seconds. Takes the model apart."""
    device = model.head_weight.device
    seconds, logits = {}, {}

    def timed(name: str, work):
        synchronize(device)
        started = time.perf_counter()
        result = work()
        synchronize(device)
        seconds[name] = time.perf_counter() - started
        return result

    def forward(ids: list[int], **images) -> Tensor:
        hidden = model(torch.tensor([ids], device=device), **images)
        return model.logits(hidden)[0].float().cpu()

    # 1. Logits [T, V] of the text, and its loss: mean of what is new, and of what comes again.
    logits["text"] = timed("text", lambda: forward(inputs.text))
    targets = torch.tensor(inputs.text[1:])
    losses = F.cross_entropy(logits["text"][:-1], targets, reduction="none")
    again = len(tokenizer.encode(PASSAGE))

    # 2. Of the picture.
    if inputs.picture is not None:
        images = {"image_grid_thw": inputs.picture.grids}
        images["pixel_values"] = inputs.picture.pixel_values().to(device)
        logits["picture"] = timed("picture", lambda: forward(inputs.picture.ids, **images))

    # 3. The loss as in training: of a pack, through the head's own kernel.
    row = make_row(*inputs.lesson)
    pack = make_pack([row]).to(device)
    lesson_loss = timed("lesson", lambda: sft_loss(model, pack)).item() / int(row.scored.sum())

    # 4. What it says, for people to read.
    sampler = Sampler(model, tokenizer, frozen=True)
    prompts = [inputs.question] + ([inputs.picture] if inputs.picture else [])
    params = SamplingParams(new_tokens, 0.0)
    groups = timed("answers", lambda: sampler.generate(prompts, params))
    answers = [group[0] for group in groups]
    return {
        "logits": logits,
        "text_loss": losses[:-again].mean().item(),
        "copy_loss": losses[-again:].mean().item(),
        "lesson_loss": lesson_loss,
        "answers": [answer.text for answer in answers],
        "answer_tokens": sum(len(answer.ids) for answer in answers),
        "seconds": seconds,
    }


# --- Beside transformers ---


def compare(peer: str, folder: Path, about: dict, inputs: Inputs, ours: dict) -> dict:
    """Returns transformers' report, with how far we are from it under "differences"."""
    chat = conversation(ASKED_OF_PICTURE if inputs.picture else ASKED, bool(inputs.picture))
    asked = ask_for_logits(
        peer,
        str(folder),
        inputs.tensors(),
        dtype=about["dtype"],
        device=about["device"],
        text=TEXT,
        chat=chat,
        picture=draw_picture() if inputs.picture else None,
    )
    found = {}
    with asked as (theirs, file):
        for name, logits in ours["logits"].items():
            found[name] = compare_logits(logits, file.get_tensor(name))
        if inputs.picture is not None and theirs["patches"] is None:
            patches = file.get_tensor("patches") - inputs.picture.pixel_values()
            found["patches"] = patches.abs().max().item()
    found["loss"] = abs(ours["lesson_loss"] - theirs["losses"]["lesson"])
    for name, ids in (("tokens", inputs.text), ("chat", inputs.template_ids())):
        if isinstance(theirs[name], list):
            found[f"{name}_equal"] = theirs.pop(name) == ids
    return theirs | {"differences": found}


def print_differences(theirs: dict) -> None:
    """Prints how far our logits and loss are from those of transformers."""
    found = theirs["differences"]
    for name in ("text", "picture"):
        if name in found:
            each = found[name]
            print(f"{name:<11}logits: max |diff| {each['max_diff']:.2g}, mean KL", end=" ")
            print(f"{each['mean_kl']:.2g} nats, likeliest token the same at {each['top1']:.1%}")
    print(f"SFT loss   {theirs['losses']['lesson']:.6f} there: differs by {found['loss']:.2g}")
    print(f"inputs     text {said(found.get('tokens_equal'), theirs.get('tokens'))}", end="; ")
    print(f"conversation {said(found.get('chat_equal'), theirs.get('chat'))}")
    if "picture" in found:
        patches = f"patches: not compared ({theirs['patches']})"
        if "patches" in found:
            patches = f"patches: max |diff| {found['patches']:.2g}"
        print(f"           {patches}")


def said(equal: bool | None, reason) -> str:
    """Returns the outcome of comparing ids; `reason` says why there were none."""
    if equal is None:
        return f"ids: not compared ({reason})"
    return "ids: equal" if equal else "ids: NOT equal"


# --- The verdict ---


def decide(ours: dict, theirs: dict | None, dtype: str, vocab: int) -> tuple[str, str]:
    """Returns the verdict, one of three words, and why."""
    guess = math.log(vocab)
    english = (
        f"mean loss on English {ours['text_loss']:.2f} nats, on its copy {ours['copy_loss']:.2f}, "
        f"of a blind guess {guess:.2f}"
    )
    knows_english = ours["text_loss"] < guess / 2 and ours["copy_loss"] < MAX_COPY_LOSS
    if theirs is not None:
        faults = find_faults(theirs["differences"], dtype)
        if theirs["loading"]:
            faults.append(f"transformers lacks {', '.join(theirs['loading'][:3])}")
        if faults:
            return "REFUTED", "; ".join(faults)
        reason = f"transformers agrees on {', '.join(what_was_compared(theirs['differences']))}"
        return "CONFIRMED", reason if knows_english else f"{reason}; but {english}"
    if not knows_english:
        return "REFUTED", f"{english}: these weights are random, or are used wrongly here"
    return "PLAUSIBLE", f"nothing to compare with, but all tensors are right; {english}"


def paragraph(report: dict) -> str:
    """Returns the report in a few lines of Markdown, for an issue."""
    folder, about, verdict = report["folder"], report["about"], report["verdict"]
    lines = [
        f"**check_weights: {verdict}**: {report['reason']}. `{folder['folder']}`: "
        f"{folder['type']}, {folder['parameters']:,} parameters, {folder['tensors_right']} of "
        f"{folder['tensors_expected']} tensors, {', '.join(folder['dtypes'])}, "
        f"{'tied' if folder['tied'] else 'separate'} head, {folder['files']} file(s). "
    ]
    versions = f"torch {about['torch']}"
    if "transformers" in report:
        versions += f", transformers {report['transformers']['transformers']}"
    lines.append(
        f"Commit {str(about['commit'])[:10]}, {about['date']}, {about['dtype']} on "
        f"{about['machine']}, {versions}. "
    )
    if "ours" in report:
        ours = report["ours"]
        lines.append(
            f"Text loss {ours['text_loss']:.4f}, copied {ours['copy_loss']:.4f}, "
            f"SFT loss {ours['lesson_loss']:.6f}"
        )
    if "transformers" in report:
        found = report["transformers"]["differences"]
        lines.append(f" (differs by {found['loss']:.2g})")
        for name in ("text", "picture"):
            if name in found:
                each = found[name]
                lines.append(
                    f"; {name} logits: max diff {each['max_diff']:.2g}, "
                    f"KL {each['mean_kl']:.2g}, top-1 {each['top1']:.1%}"
                )
    if "ours" in report:
        took = ", ".join(f"{name} {value:.2f}" for name, value in ours["seconds"].items())
        lines.append(f". Seconds: {took}; peak {in_gib(ours['peak_bytes'])}.")
    return "".join(lines)


def check(options: CheckOptions) -> dict:
    """Looks at everything, prints it as it comes, and returns the report."""
    # 1. What it is. Whatever cannot be read is an error.
    folder = Path(options.folder)
    peer = find_peer(options.peer)
    config = Config.from_pretrained(folder)
    limit_threads(config)
    device = pick_device(options.device)
    name = options.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    tokenizer = Tokenizer.from_pretrained(folder)
    check_vocabulary(tokenizer, config)
    images = ImageConfig.from_pretrained(folder) if config.vision is not None else None
    about = {
        "date": str(date.today()),
        "commit": git_commit(),
        "device": str(device),
        "machine": machine(device),
        "dtype": name,
        "torch": torch.__version__,
    }
    report = {"about": about, "folder": describe(folder, config)}
    print_description(report["folder"], tokenizer, config, images)

    # 2. All tensors. What is not as expected refutes us.
    dtype = getattr(torch, name)
    started = time.perf_counter()
    try:
        model = Qwen2_5_VL.from_pretrained(folder, device=device, dtype=dtype)
    except InputError as error:
        return report | {"verdict": "REFUTED", "reason": str(error)}
    load_seconds = time.perf_counter() - started

    # 3. Our side; then the memory is for the other.
    inputs = make_inputs(tokenizer, images)
    ours = run_ours(model, tokenizer, inputs, options.new_tokens)
    ours["seconds"] = {"load": load_seconds} | ours["seconds"]
    ours["peak_bytes"] = peak_bytes(device)
    print_ours(ours, inputs)
    del model
    gc.collect()
    torch.cuda.empty_cache()

    # 4. Their side.
    theirs = None
    if peer is not None:
        print(f"\nBeside transformers ({peer}):", flush=True)
        theirs = compare(peer, folder, about, inputs, ours)
        print_differences(theirs)
        report["transformers"] = theirs
    del ours["logits"]
    verdict, reason = decide(ours, theirs, name, config.vocab_size)
    return report | {"ours": ours, "verdict": verdict, "reason": reason}


def print_ours(ours: dict, inputs: Inputs) -> None:
    seconds = ours["seconds"]
    print(f"loaded     in {seconds['load']:.1f} s; peak of memory {in_gib(ours['peak_bytes'])}")
    print(f"text       {len(inputs.text)} tokens in {seconds['text']:.2f} s", end=", ")
    print(f"mean loss {ours['text_loss']:.4f} nats, copied {ours['copy_loss']:.4f}")
    if inputs.picture is not None:
        print(f"picture    {len(inputs.picture.ids)} tokens in {seconds['picture']:.2f} s")
    scored = sum(inputs.lesson[1])
    print(f"SFT loss   {ours['lesson_loss']:.6f} of {scored} tokens in {seconds['lesson']:.2f} s")
    print(f"answers    {ours['answer_tokens']} tokens in {seconds['answers']:.2f} s")
    for asked, answer in zip((ASKED, ASKED_OF_PICTURE), ours["answers"]):
        print(f"  > {asked}\n  {answer}")


def main(argv: list[str]) -> None:
    options = parse_options(CheckOptions, argv)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    with memory_phase("the check", "--dtype bfloat16", "--device cpu"):
        report = check(options)
    print(f"\n{paragraph(report)}\n\n{report['verdict']}: {report['reason']}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["verdict"] == "REFUTED":
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
