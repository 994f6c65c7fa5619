"""Claims that go beyond the paper, in the same form: a remedy, and what the effect depends on.

What would refute a claim was written down before it was measured (see micro/paper_claims.py).
"""

from collections.abc import Callable

from micro.claim_data import deep_strips, shipped
from micro.claim_parts import (
    Rows,
    base,
    figure_of,
    gain,
    grpo,
    overall,
    percent,
    row,
    sft,
    x_reasoner,
)
from micro.paper_claims import MED_UNIT, SHARES, med
from micro.reproduce import COLUMNS
from micro.verdicts import DEEP, Bound, Claim, Table


def med_mixed(seed: int) -> Rows:
    return med(seed, SHARES)


def mixed_bounds() -> tuple[Bound, ...]:
    bounds = []
    for part, whole in SHARES:
        name = f"Med SFT + RL, {part}/{whole} general"
        for text, column, least in (("A text", "A text", -1), ("A image", "A image", -1),
                                    ("G image", "G image", 40)):  # fmt: skip
            figure = gain(name, "X-Reasoner", column)
            bounds.append(Bound(f"{part}/{whole} mixed in: change on {text}", figure, least))
    return tuple(bounds)


MED_MIXED = Claim(
    "med-mixed",
    "not in the paper",
    "Mixing general questions into both stages of Med prevents forgetting, and Med is learned.",
    "with a share mixed in, text or images of A still lose more than 1 point, or images of G gain "
    "less than 40. (The smallest share that passes is the remedy.)",
    med_mixed,
    mixed_bounds(),
    (0, 1, 2, 3),
    MED_UNIT,
    remark=(
        "With an eighth A loses 0.6 points at most in each seed, and G's images end where they do "
        "without it; the bound is undecided since the seeds differ (-0.6 to 2.6). More is not "
        "better: with a quarter or a half, seed 2 loses 3 to 4 points of A's images, and with a "
        "half G's images end lower in two seeds."
    ),
)


# --- 9. Beyond the paper --------------------------------------------------------------------------

# Share of the rows that may have an image, in the last two stages of a base's pre-training; 0.6 is
# the shipped one's. Before that every base's ViT is trained on 6,400 images.
IMAGE_SHARES = (0.6, 0.2, 0.05)
WIDTHS = (64, 128, 192)  # of the base's decoder; 128 is the shipped one's
CHANCE = 10  # %, of a blind guess
READ_UNIT = (
    f"{DEEP}; reading: 200 such strips of A read out without an error when asked to read, in %; "
    "misread: images of A answered wrongly by a chain that restates another question, in %"
)
misread = percent("failures", "misread")


def by_base(seed: int, name: str, values: tuple, default) -> Rows:
    """Returns the rows of bases that differ in one option of micro/pretrain.py, stage by stage.

    name, values: the option. default: the shipped base's value of it.
    """
    rows = {}
    for value in values:
        options = {} if value == default else {name: value}
        start = base(seed, **options)
        models = {"base": start, "SFT": sft(start), "SFT + RL": x_reasoner(seed, **options)}
        for stage, model in models.items():
            rows[f"{name} {value}: {stage}"] = {
                "reading": figure_of(model, deep_strips(), overall),
                "misread": figure_of(model, shipped(COLUMNS["A image"]), misread),
                **row(model),
            }
    return rows


def reading_claim(seed: int) -> Rows:
    return by_base(seed, "image_share", IMAGE_SHARES, 0.6)


def over_prediction(share: float) -> Callable[[Table], float]:
    """Returns what computes by how much images do better than reading times reasoning."""

    def figure(t: Table) -> float:
        read = t[f"image_share {share}: base"]["reading"] / 100
        final = t[f"image_share {share}: SFT + RL"]
        return final["A image"] - (read * final["A text"] + (1 - read) * CHANCE)

    return figure


READING = Claim(
    "reading",
    "not in the paper",
    "What carries over to images is as much as the base can read: accuracy on images is reading "
    "times reasoning, plus a guess for the rest.",
    "for the shipped kind of base or for one that has seen fewer images, images of A after both "
    "stages are more than 8 points above or below what this predicts: (share of the images that "
    "the base reads out without an error) x (accuracy on text) + (the rest) x 10%.",
    reading_claim,
    tuple(
        Bound(f"image share {share}: measured - predicted", over_prediction(share), -8, 8)
        for share in IMAGE_SHARES
    ),
    unit=READ_UNIT,
    in_quick=False,
    remark=(
        "The rows of the shipped kind of base were known in substance: what fails there is "
        "misread in seed 0, is mostly out of order in seed 1, and mostly takes wrong steps in "
        "seed 2. The test proper is image share 0.2: there images are 10.9 points below the "
        "prediction. Why, was asked after seeds 0 and 1 had been seen. About 4.5 points are "
        "reading that the training on text costs these weak readers (89.5, 86.5 and 95.5% of the "
        "strips before, 84.5, 83.5 and 88.0% after SFT; RL changes little more, and a good reader "
        "loses a point at most). Another 4.8 fail behind a right restatement (3.3, 5.5 and 5.8: "
        "wrong steps, another order, going on), although text is at 100%. The other 1.5 are not "
        "explained: chains may misread more often than a model that is asked to read, or be right "
        "by chance less often than in 10%. With the trained model's own reading in the prediction "
        "images are 6.4 +- 0.8 points below, which by the bound of 8 is undecided. With 0.05 at "
        "most an eighth of the strips is read, and images end within 5.1 points of what that "
        "foretells (9 to 22%)."
    ),
)


def size(seed: int) -> Rows:
    return by_base(seed, "width", WIDTHS, 128)


def size_gain(width: int, column: str) -> Callable[[Table], float]:
    return gain(f"width {width}: SFT + RL", f"width {width}: base", column)


def share_of_text(width: int) -> Callable[[Table], float]:
    """Returns what computes the gain on images in % of that on text (which is at least a point)."""
    on_text, on_images = size_gain(width, "A text"), size_gain(width, "A image")
    return lambda t: 100 * on_images(t) / max(1.0, on_text(t))


SIZE = Claim(
    "size",
    "not in the paper",
    "The effect does not need the shipped size of base: with a decoder half as wide, or half as "
    "wide again, it is there as well (depth, vision tower and training as they are).",
    "at some width images of A gain less than 40 points, or less than 80% of what text gains.",
    size,
    (
        *(Bound(f"width {w}: gain on A image", size_gain(w, "A image"), 40) for w in WIDTHS),
        *(Bound(f"width {w}: images, % of text's gain", share_of_text(w), 80) for w in WIDTHS),
    ),
    unit=READ_UNIT,
    in_quick=False,
    remark=(
        "Width 128 is the base of the other claims. Two of the narrow bases know the single steps "
        "imperfectly (by pretrain.py's report 94 and 65% on text of A, 88 and 61% on its images; "
        "the others 99 or 100%), and do not learn text of A to the end. The third does, and "
        "misreads 28% of the images (11% before training, 23% after SFT). As in `reading`, "
        "training on text costs a weak reader a part of its reading: asked to read, it has 88.5% "
        "of the strips right before, 63.0% after SFT, and 65.5% in the end; in seed 1 80.0, 67.5 "
        "and 66.0%; in seed 0, which reads 99%, nothing is lost. So this says what a base must "
        "bring, more than what carries over. The wide ones are as good as the shipped width on "
        "images of A. L follows less in each seed: 46 to 56% of its text, where the shipped width "
        "has 90 to 93%. It is so after SFT already (49 to 57%), and RL does not mend it. What "
        "fails are mostly wrong steps or their order, hardly ever the reading. Why more so than "
        "in the shipped width, we do not know."
    ),
)

# Of 60 rollouts, after which there is room left on images; each of 128 responses.
VARIANTS = {
    "no std normalisation": {"normalize_std": False},
    "KL 1e-3": {"kl_coef": 1e-3},
    "KL 1e-2": {"kl_coef": 1e-2},
    "groups of 4": {"group_size": 4, "questions_per_step": 32},
    "groups of 16": {"group_size": 16, "questions_per_step": 8},
}
# With one update a rollout the ratio is 1 and nothing is ever clipped. So clipping is compared with
# four updates a rollout.
UPDATES = {"updates_per_rollout": 4}
CLIPS = {"4 updates, clip 0.28": UPDATES, "4 updates, clip 0.2": UPDATES | {"clip_eps_high": 0.2}}
DEFAULT, ANEW = "as shipped", "as shipped, sampled anew"


def variants(seed: int) -> Rows:
    """Returns the cells of each variant, and of the shipped options with other random numbers.

    That row has no bound: it says by how much two runs differ that do not differ in anything else.
    """
    start = sft(base(seed))
    rows = {"SFT": row(start)}
    for name, options in {DEFAULT: {}, ANEW: {"seed": seed + 100}, **VARIANTS, **CLIPS}.items():
        rows[name] = row(grpo(start, max_steps=60, **options))
    return rows


VARIANTS_CLAIM = Claim(
    "variants",
    "not in the paper",
    "No knob of GRPO decides what images gain: each variant ends where the shipped options do.",
    "a variant differs from the shipped options by more than 3 points on images of A (what does is "
    "what matters); clip-higher is compared with 0.2 at four updates a rollout.",
    variants,
    (
        *(
            Bound(f"{name} - {DEFAULT}, A image", gain(name, DEFAULT, "A image"), -3, 3)
            for name in VARIANTS
        ),
        Bound("clip 0.28 - clip 0.2, A image", gain(*CLIPS, "A image"), -3, 3),
    ),
    unit=f"{DEEP}, after 60 rollouts of 128 answers",
    in_quick=False,
    remark=(
        "Two runs that differ in nothing but their random numbers (`sampled anew`) are up to 2.3 "
        "points apart on images of A and 6 on text of L: a difference of that size can be chance. "
        "The largest is that of the clips, at four updates a rollout, in favour of the plain one: "
        "0, 10 and 0.8 points on images of A, 0, 9.5 and 7.3 on those of L (in seed 0 the two "
        "end the same to the digit)."
    ),
)


FURTHER_CLAIMS = (MED_MIXED, READING, SIZE, VARIANTS_CLAIM)
