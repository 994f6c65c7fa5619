"""What the paper claims, claim by claim, measured on the micro world: what holds, what does not.

    python micro/claims.py                       # or: make claims. Hours; goes on where it stopped
    python micro/claims.py --quick               # or: make claims-quick. One seed of most of them
    python micro/claims.py --claim med --seeds 0 1
    python micro/claims.py --plan                # what there is to make, and how long that takes
    python micro/claims.py --summary             # what micro/results/claims says, without running

The claims are data (micro/paper_claims.py, further_claims.py, why_claims.py): each has a sentence,
what would refute it, the models and test sets that it needs (micro/experiments.py), and bounds from
which the verdict follows (micro/verdicts.py). A seed's table of a claim is written to
micro/results/claims as soon as all that it needs is there. In the end this prints Markdown, and
writes it to docs/claims.md, and the verdicts to docs/results.md; with --quick or --smoke all stays
in the folder of the runs.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.errors import InputError
from hub.options import ROOT, run_command
from micro.experiments import Place, sources
from micro.further_claims import FURTHER_CLAIMS
from micro.paper_claims import PANELS, PAPER_CLAIMS, curve
from micro.schedule import Task, make_all, print_plan, tasks_for
from micro.verdicts import Claim, Table, digest, report, write_results
from micro.why_claims import WHY_CLAIMS
from training.journal import write_whole

CLAIMS = (*PAPER_CLAIMS, *FURTHER_CLAIMS, *WHY_CLAIMS)
RESULTS = ROOT / "micro" / "results" / "claims"
PAGE = ROOT / "docs" / "claims.md"
DIGEST = ROOT / "docs" / "results.md"  # has the verdicts in short, between two marks
MARKS = ("<!-- written by micro/claims.py -->\n", "<!-- end of what it writes -->\n")
INTRODUCTION = """# The paper's claims, one by one

Written by `python micro/claims.py`, from `micro/results/claims`. All on the micro world
([micro/README.md](../micro/README.md)): A is the domain that is trained on, as text; L is alike
with other symbols, G is of another kind. Seed 0 starts from the shipped base, every other from one
of its own, pre-trained from nothing. The questions to train on and to test on are the same for all:
their spread (a cell of 500 has a standard error of up to 2.2 points) is not in that over seeds.
"Runs" names the code and the machine of training; evaluations may be of later code. A gain is
counted from the row before the training that is tested, never from chance. Answers are greedy where
nothing else is said. Of the 500 questions of a cell, 400 take more than two steps (375 of G). There
a blind guess is right in 10% (G: 17%), and the base, which answers with its state after two steps,
in less.

What would refute a claim was written down before it was measured. Where some seeds had been seen by
then, the claim says so, and they are shown in brackets and not judged. What the first edition of
this project had measured on the same bases (docs/log.md, 2026-11-24 and 25) is an exception: most
of `thoughts`, `stages`, `masked`, `med` and `dynamics`, the first two bounds of `anchor`, and the
rows of the shipped kind of base in `size` and `reading`. There the verdicts repeat what was known,
and test no prediction.

A bound *holds* if the mean over seeds is on its right side by at least two standard errors, it
*does not hold* if the mean is on the wrong side by more than that, and in between it is
*undecided*. With three seeds that is weak evidence: at the border chance alone passes it in 9 of
100 cases (five seeds: 6, two: 15), and a claim of many bounds is the more easily refuted by one of
them. A claim about *every* base is judged by the mean, too. So the seeds stand beside each mean. Of
a seed alone the figure itself is compared. What stands behind a verdict was written after the
measurement.

"""
CURVE_STEPS = 5  # of GRPO, whose mean is one point of the picture


def read_table(claim: Claim, seed: int, place: Place) -> Table:
    """Returns a claim's table of a seed, from cells and runs that are all there."""
    return {
        name: {column: round(figure.read(place), 4) for column, figure in row.items()}
        for name, row in claim.table(seed).items()
    }


def read_curves(claim: Claim, seed: int, place: Place) -> dict[str, list[float | None]]:
    """Returns the curves of a claim's run, each point the mean of some steps.

    A point is None where none of them has measured the field.
    """
    curves = {}
    for field in PANELS:
        values = curve(claim.curves(seed), place, field)
        points = []
        for start in range(0, len(values), CURVE_STEPS):
            known = [v for v in values[start : start + CURVE_STEPS] if v is not None]
            points.append(float(f"{fmean(known):.4g}") if known else None)
        curves[field] = points
    return curves


def measured(claim: Claim, seed: int, place: Place) -> dict:
    """Returns what is written of a claim and a seed."""
    result = {"sources": sources(claim.needs(seed), place), "table": read_table(claim, seed, place)}
    if claim.curves:
        result["curves"] = read_curves(claim, seed, place)
    return result


def choose(names: list[str] | None, quick: bool) -> tuple[Claim, ...]:
    """Returns the claims of these names; without names, all that are measured."""
    known = {claim.name: claim for claim in CLAIMS}
    if names is None:
        return tuple(claim for claim in CLAIMS if claim.in_quick or not quick)
    for name in names:
        if name not in known:
            raise InputError(f"--claim {name}: there is no such claim; {', '.join(known)}")
    return tuple(known[name] for name in names)


def insert(text: str, new: str) -> str:
    """Returns a text with what stands between the marks replaced.

    Raises InputError without one pair of marks: all that stands behind would be lost.
    """
    first, last = MARKS
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise InputError(f"{DIGEST}: micro/claims.py needs its two marks there, once, in order")
    before, _, rest = text.partition(first)
    _, _, after = rest.partition(last)
    return before + first + new + last + after


Pairs = list[tuple[Claim, int]]  # with a seed


def pair_up(claims: tuple[Claim, ...], seeds: list[int] | None) -> Pairs:
    """Returns each claim with each of its seeds, seed by seed: the first is complete first.

    Raises InputError for a seed that none of the claims states: no page would show it.
    """
    stated = {seed for claim in claims for seed in claim.seeds}
    for seed in seeds or ():
        if seed not in stated:
            raise InputError(f"--seeds {seed}: it is stated by no claim that is asked for")
    wanted = stated if seeds is None else set(seeds)
    pairs = [(claim, seed) for claim in claims for seed in claim.seeds if seed in wanted]
    return sorted(pairs, key=lambda pair: pair[1])  # stable: the claims keep their order


def plan(pairs: Pairs, place: Place) -> list[Task]:
    """Returns all that is to be made, seed by seed, and of a seed the bases first.

    A base takes two cores. Between runs of one core it would wait until both are free, and one of
    them would idle.
    """
    tasks = tasks_for([claim.needs(seed) for claim, seed in pairs], place)
    return sorted(tasks, key=lambda task: (task.seed, task.cores == 1))


def measure(pairs: Pairs, place: Place, results: Path, cores: int) -> list[str]:
    """Makes everything, and writes each table as soon as it can be read. Returns what failed."""
    waiting = list(pairs)

    def write_complete() -> None:
        for claim, seed in list(waiting):
            if all(need.done(place) for need in claim.needs(seed)):
                waiting.remove((claim, seed))
                write_results(results, claim, seed, measured(claim, seed, place))
                print(f"measured: {claim.name}, seed {seed}", flush=True)

    write_complete()
    return make_all(plan(pairs, place), place, cores, write_complete)


def main(argv: list[str]) -> None:
    """Measures what is missing, and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--claim", nargs="+", metavar="NAME", help=", ".join(claim.name for claim in CLAIMS))
    add("--seeds", type=int, nargs="+", help="only these, of those that each claim states")
    add("--quick", action="store_true", help="seed 0, and only some claims")
    add("--plan", action="store_true", help="list what there is to make, and stop")
    add("--summary", action="store_true", help="from the results alone; runs nothing")
    add("--smoke", action="store_true", help="two steps a run, 20 questions: does it all work?")
    add("--out", type=Path, default=Path("runs/claims"), help="folder of the runs")
    add("--cores", type=int, default=2, help="runs at the same time, of one thread each")
    args = parser.parse_args(argv)
    claims = choose(args.claim, args.quick)
    place = Place(args.out / "smoke" if args.smoke else args.out, args.smoke)
    apart = args.quick or args.smoke  # from the results that are committed
    results = place.out / "results" if apart else RESULTS
    page = place.out / "claims.md" if apart else PAGE

    failed = []
    if not args.summary:
        pairs = pair_up(claims, [0] if args.quick and not args.seeds else args.seeds)
        if args.plan:
            print_plan(plan(pairs, place), place, args.cores)
            return
        failed = measure(pairs, place, results, args.cores)
    # The page has every claim, whichever were asked for.
    write_whole(page, (INTRODUCTION + report(CLAIMS, results)).encode())
    if not apart:
        short = insert(DIGEST.read_text(encoding="utf-8"), digest(CLAIMS, results, PAGE.name))
        write_whole(DIGEST, short.encode())
    print("\n" + report(claims, results))
    print(f"{page} written")
    if failed:
        raise InputError(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
