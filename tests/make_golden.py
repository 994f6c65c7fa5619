"""Makes the golden values of tests/golden/model_* with transformers, on tests/tiny.py's folders.

    python tests/make_golden.py           # writes them (needs transformers 5; the tests do not)
    python tests/make_golden.py --check   # compares with transformers live, both ways, and prints

Everything is float32 on the CPU. Only outputs are kept: the weights are a formula.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

GOLDEN = Path(__file__).parent / "golden"


def load(folder: Path, attention: str = "eager") -> torch.nn.Module:
    """The folder in transformers, strictly: nothing missing, unexpected or misshapen."""
    model, info = (
        transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
        if "vision_config" in (folder / "config.json").read_text()
        else transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    )
    assert not any(info.values()), info
    return model.eval()


def run(model: torch.nn.Module, case: tiny.Case, **kwargs):
    """transformers' outputs for a right-padded case."""
    ids, lengths, grids = case.input_ids, case.lengths, case.grids
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    if grids:
        inputs |= {
            "pixel_values": tiny.patches(grids),
            "image_grid_thw": torch.tensor(grids),
            # without it, positions silently fall back to one dimension
            "mm_token_type_ids": (ids == tiny.special_ids()["image_pad"]).int(),
        }
    return model(**inputs, output_hidden_states=True, use_cache=False, **kwargs)


def gradients(model: torch.nn.Module, case: tiny.Case) -> dict[str, np.ndarray]:
    """Loss over the case's labels, and of each tensor's gradient the norm and some values."""
    model.zero_grad()
    loss = run(model, case, labels=case.labels).loss
    loss.backward()
    out = {"loss": loss.detach().numpy()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            name = name.replace("model.language_model.", "model.").replace(
                "model.visual.", "visual."
            )
            out[f"grad/{name}"] = tiny.gradient_summary(parameter.grad).numpy()
    return out


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    outputs, grads, sft = {}, {}, {}
    with tempfile.TemporaryDirectory() as tmp:
        for variant in tiny.VARIANTS:
            model = load(tiny.make_folder(Path(tmp) / variant, variant))
            for name, case in tiny.cases(variant).items():
                with torch.no_grad():
                    out = run(model, case)
                hidden, logits = tiny.summary(out.hidden_states[-1], out.logits, case.lengths)
                outputs |= {
                    f"{variant}/{name}/hidden": hidden.numpy(),
                    f"{variant}/{name}/logits": logits.numpy(),
                }
                if case.grids and name == "images":
                    position_ids, deltas = model.model.get_rope_index(
                        case.input_ids,
                        (case.input_ids == tiny.special_ids()["image_pad"]).int(),
                        image_grid_thw=torch.tensor(case.grids),
                        attention_mask=(
                            torch.arange(case.input_ids.shape[1]) < case.lengths[:, None]
                        ).long(),
                    )
                    outputs[f"{variant}/{name}/position_ids"] = position_ids.numpy().astype(
                        np.int16
                    )
                    outputs[f"{variant}/{name}/deltas"] = deltas[:, 0].numpy()
            if variant in ("vl_tied", "vl_group7", "text"):
                grads |= {
                    f"{variant}/text/{k}": v
                    for k, v in gradients(model, tiny.cases(variant)["text"]).items()
                }
            if variant == "vl":
                grads |= {
                    f"vl/images/{k}": v
                    for k, v in gradients(model, tiny.cases(variant)["images"]).items()
                }
                with torch.no_grad():
                    features = model.model.visual(
                        tiny.patches(tiny.FEATURE_GRIDS), torch.tensor(tiny.FEATURE_GRIDS)
                    )
                outputs["vl/features"] = features.pooler_output[:, ::8].numpy()
            if variant in ("vl", "vl_tied"):
                sft |= {f"{variant}/{k}": v for k, v in gradients(model, tiny.sft_case()).items()}
            if variant == "vl_tied":
                model.save_pretrained(Path(tmp) / "saved")
                (GOLDEN / "model_config_v5.json").write_text(
                    (Path(tmp) / "saved" / "config.json").read_text()
                )
    for name, arrays in (("outputs", outputs), ("grads", grads), ("sft", sft)):
        np.savez_compressed(GOLDEN / f"model_{name}.npz", **arrays)
    print({path.name: path.stat().st_size for path in sorted(GOLDEN.glob("model_*"))})


def check() -> None:
    """transformers loads what we save, we load what it saves, and both compute the same."""
    from model import Qwen2_5_VL

    def compare(ours: Qwen2_5_VL, theirs: torch.nn.Module, case: tiny.Case) -> float:
        real = torch.arange(case.input_ids.shape[1]) < case.lengths[:, None]
        with torch.no_grad():
            hidden = ours(
                case.input_ids,
                pixel_values=tiny.patches(case.grids) if case.grids else None,
                image_grid_thw=case.grids or None,
            )
            out = run(theirs, case)
        return max(
            (ours.logits(hidden) - out.logits)[real].abs().max().item(),
            (hidden - out.hidden_states[-1])[real].abs().max().item(),
        )

    transformers.logging.set_verbosity_error()
    random = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as tmp:
        for variant in tiny.VARIANTS:
            for layout, shards in (("old", 1), ("old", 3), ("new", 1)):
                if layout == "new" and not variant.startswith("vl"):
                    continue
                name = f"{variant}-{layout}-{shards}"
                folder = tiny.make_folder(Path(tmp) / name, variant, layout=layout, shards=shards)
                ours, cases = Qwen2_5_VL.from_pretrained(folder), tiny.cases(variant)
                ours.save_pretrained(Path(tmp) / f"{name}-ours")
                theirs = load(Path(tmp) / f"{name}-ours", "sdpa")
                theirs.save_pretrained(Path(tmp) / f"{name}-theirs", max_shard_size="300KB")
                again = Qwen2_5_VL.from_pretrained(Path(tmp) / f"{name}-theirs")
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(ours.state_dict().values(), again.state_dict().values())
                )
                assert again.config == ours.config, (again.config, ours.config)
                figures = {k: f"{compare(again, theirs, case):.1e}" for k, case in cases.items()}
                figures |= {
                    k + "/eager": f"{compare(again, load(folder), case):.1e}"
                    for k, case in cases.items()
                }
                if variant.startswith("vl"):
                    fuzz = []
                    for trial in range(10):
                        grids = [
                            (1, 2 * random.randint(1, 12), 2 * random.randint(1, 12))
                            for _ in range(4)
                        ]
                        rows = [tiny.row(trial, 9, grids[:3]), tiny.row(trial + 99, 12, grids[3:])]
                        fuzz.append(compare(again, theirs, tiny.Case(rows, grids)))
                    figures["40 random grids"] = f"{max(fuzz):.1e}"
                print(f"{name}: max |difference| of logits and hidden states", json.dumps(figures))
                ours.save_pretrained(Path(tmp) / f"{name}-bf16", dtype=torch.bfloat16)
                half = transformers.AutoConfig.from_pretrained(Path(tmp) / f"{name}-bf16")
                assert half.dtype == torch.bfloat16


if __name__ == "__main__":
    check() if "--check" in sys.argv else main()
