"""From figures to plain verdicts: what a claim says, what would refute it, and does it hold?

A claim's figures are a table for each seed (rows, columns, numbers), and its bounds are stated
before they are measured; a seed that was seen before that is shown, and not judged. A bound holds
if the mean over seeds is on its right side by at least two standard errors, it does not hold if the
mean is on the wrong side by more than that, and in between it is undecided. Where only one seed has
been measured its figure alone is compared, and the verdict says how many seeds are missing.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev

from hub.errors import InputError
from micro.experiments import Cell, Place, Probe, Run, locked
from training.journal import write_json

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "does not hold", "undecided", "not measured"
NO_CASE = "no case"  # of a bound: it is about something that occurred in no seed
ERRORS = 2  # a mean so many standard errors from a bound is on that side of it

DEEP = "accuracy in %, questions of more than two steps (k > 2)"

Table = dict[str, dict[str, float]]  # row -> column -> number
Tables = dict[int, Table]  # by seed


@dataclass(frozen=True)
class Figure:
    """A number of a table: what has to be there first, and how it is read from it."""

    needs: tuple[Run | Cell | Probe, ...]
    read: Callable[[Place], float]


@dataclass(frozen=True)
class Bound:
    """A figure, computed from a seed's table, and what it must be on average over the seeds.

    The figure is None where a seed has nothing to judge, such as failures where nothing fails.
    """

    text: str
    figure: Callable[[Table], float | None]
    at_least: float = -inf
    at_most: float = inf

    @property
    def limits(self) -> str:
        parts = []
        if self.at_least > -inf:
            parts.append(f"at least {self.at_least:g}")
        if self.at_most < inf:
            parts.append(f"at most {self.at_most:g}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper (or of ours), and how it is tested.

    name: as --claim takes it. paper: its table or figure. says: the claim. refuted: what figures
    would refute it, in words; `bounds` has them in numbers. table: of a seed. seeds: those it is
    measured on. looked_at: those of them that were seen before the bounds were stated: they are
    shown, and not judged. remark: what the figures mean, written after them. curves: runs whose
    metrics.jsonl is kept beside the table, for a picture.
    """

    name: str
    paper: str
    says: str
    refuted: str
    table: Callable[[int], dict[str, dict[str, Figure]]]
    bounds: tuple[Bound, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    unit: str = DEEP
    looked_at: tuple[int, ...] = ()
    remark: str = ""
    in_quick: bool = True
    curves: Callable[[int], Run] | None = None

    def needs(self, seed: int) -> Iterator[Run | Cell | Probe]:
        """Yields all that a seed's table is read from."""
        for row in self.table(seed).values():
            for figure in row.values():
                yield from figure.needs
        if self.curves:
            yield self.curves(seed)


# --- Verdicts -------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Returns the mean over seeds and its standard error; of one seed, NaN as the error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return fmean(values), error


def judge(figures: list[float | None], bound: Bound) -> str:
    """Returns the verdict on a bound, from its figure in each seed that is judged.

    Between two limits the mean must be two standard errors from both; outside of one is enough to
    refute. Where several seeds are judged and one alone has a figure, its error is not known, so
    the bound is undecided.
    """
    values = known(figures)
    if not values:
        return NO_CASE
    if len(values) == 1 < len(figures):
        return UNDECIDED
    mean, error = mean_and_error(values)
    margin = 0.0 if len(values) == 1 else ERRORS * error
    # Rounded, so that the noise of floating point does not decide what is exactly at the limit.
    low, high = round(mean - margin, 6), round(mean + margin, 6)
    if high < bound.at_least or low > bound.at_most:
        return FAILS
    return HOLDS if low >= bound.at_least and high <= bound.at_most else UNDECIDED


def weakest(verdicts: list[str]) -> str:
    """Returns the verdict on a claim from those on its bounds: the weakest.

    A bound without a case does not count, unless there is no other.
    """
    for verdict in (FAILS, UNDECIDED, HOLDS):
        if verdict in verdicts:
            return verdict
    return NO_CASE


def judged_seeds(claim: Claim, tables: Tables) -> list[int]:
    """Returns the seeds that the verdict rests on: those that were not seen before the bounds.

    Where there is none of them yet, it rests on the others for the time being.
    """
    fresh = [seed for seed in tables if seed not in claim.looked_at]
    return fresh or list(tables)


def figures_of(bound: Bound, claim: Claim, tables: Tables) -> list[float | None]:
    """Returns a bound's figure in each seed that is judged."""
    return [bound.figure(tables[seed]) for seed in judged_seeds(claim, tables)]


def known(figures: list[float | None]) -> list[float]:
    """Returns the figures of the seeds that have one."""
    return [figure for figure in figures if figure is not None]


def verdict_of(claim: Claim, tables: Tables) -> str:
    """Returns the verdict on a claim, with a remark where seeds are still missing."""
    if not tables:
        return MISSING
    verdicts = [judge(figures_of(bound, claim, tables), bound) for bound in claim.bounds]
    fresh = set(claim.seeds) - set(claim.looked_at)
    count = len(fresh & set(tables))
    remark = f" ({count} of {len(fresh)} seeds)" if count < len(fresh) else ""
    return weakest(verdicts) + (remark if count else " (on seeds that were seen before)")


# --- Results on the disk --------------------------------------------------------------------------


def read_results(folder: Path, claim: Claim) -> dict[str, dict]:
    """Returns what is known of a claim, by seed: its table, and where that is from."""
    path = folder / f"{claim.name}.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["seeds"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no results of micro/claims.py") from None


def write_results(folder: Path, claim: Claim, seed: int, result: dict) -> None:
    """Adds a seed to a claim's file, or replaces it there."""
    with locked(folder / f"{claim.name}.lock"):
        seeds = read_results(folder, claim) | {str(seed): result}
        seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
        stated = {"claim": claim.says, "refuted": claim.refuted}
        write_json(folder / f"{claim.name}.json", stated | {"seeds": seeds})


def tables_of(claim: Claim, results: dict[str, dict]) -> Tables:
    """Returns the tables of the claim's own seeds, by seed.

    One that has other rows or columns than the claim has now is of an earlier version: it is left
    out, as if it had not been measured.
    """
    tables = {}
    for seed in claim.seeds:
        table = results[str(seed)]["table"] if str(seed) in results else {}
        shape = {name: list(row) for name, row in claim.table(seed).items()}
        if {name: list(row) for name, row in table.items()} == shape:
            tables[seed] = table
    return tables


# --- Markdown -------------------------------------------------------------------------------------


def spread(figures: list[float | None]) -> str:
    """Returns the mean over the seeds that have a figure +- its standard error."""
    values = known(figures)
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} +- {error:.1f}"


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [line(*cells), line(*["---"] * len(cells))]


def names(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds)) or "-"


def overview(claims: tuple[Claim, ...], results: dict[str, dict]) -> list[str]:
    """Returns the lines of the table of all verdicts."""
    lines = head("claim", "paper", "what it says", "seeds", "verdict")
    for claim in claims:
        tables = tables_of(claim, results[claim.name])
        link = f"[{claim.name}](#{claim.name})"
        verdict = f"**{verdict_of(claim, tables)}**"
        lines.append(line(link, claim.paper, claim.says, names(tables), verdict))
    return lines


def each_seed(bound: Bound, claim: Claim, tables: Tables) -> str:
    """Returns a bound's figure in each seed; those that are not judged stand in brackets."""
    judged = judged_seeds(claim, tables)
    words = []
    for seed, table in tables.items():
        figure = bound.figure(table)
        word = "-" if figure is None else f"{figure:.1f}"
        words.append(word if seed in judged else f"({word})")
    return " ".join(words)


def section(claim: Claim, results: dict[str, dict]) -> list[str]:
    """Returns the lines on one claim: what it says, its table, its bounds and the verdicts."""
    tables = tables_of(claim, results)
    lines = [f"## {claim.name}", "", f"{claim.says} ({claim.paper})", ""]
    lines += [f"*Refuted by*: {claim.refuted}", ""]
    if not tables:
        return [*lines, f"{MISSING.capitalize()}."]
    first = next(iter(tables.values()))
    columns = list(dict.fromkeys(column for row in first.values() for column in row))
    seeds = f"seeds {names(tables)}" if len(tables) > 1 else f"seed {names(tables)} alone"
    lines += [f"{claim.unit[0].upper()}{claim.unit[1:]}; mean +- standard error, {seeds}:", ""]
    lines += head("", *columns)
    for name, row in first.items():
        cells = []
        for column in columns:
            values = [table[name][column] for table in tables.values()] if column in row else []
            cells.append(spread(values))
        lines.append(line(name, *cells))
    lines += ["", *head("bound", "stated", "measured", "each seed", "verdict")]
    for bound in claim.bounds:
        figures = figures_of(bound, claim, tables)
        each = each_seed(bound, claim, tables)
        verdict = judge(figures, bound)
        lines.append(line(bound.text, bound.limits, spread(figures), each, verdict))
    if len(judged_seeds(claim, tables)) < len(tables):
        lines += ["", "In brackets: seen before the bounds were stated, and not judged."]
    # The remark is about all seeds: beside a part of them it might contradict the table.
    remark = claim.remark if set(tables) == set(claim.seeds) else ""
    lines += ["", f"Verdict: **{verdict_of(claim, tables)}**. {remark}".rstrip()]
    made = sorted({one for seed in tables for one in results[str(seed)]["sources"]})
    return [*lines, "", *(f"Runs: {one}." for one in made)]


def in_short(claim: Claim, tables: Tables) -> str:
    """Returns the bounds that fail or are undecided, with their figures, and how many hold."""
    words, holding = [], 0
    for bound in claim.bounds:
        figures = figures_of(bound, claim, tables)
        verdict = judge(figures, bound)
        if verdict == HOLDS:
            holding += 1
            continue
        words.append(f"{bound.text}: {spread(figures)} ({bound.limits}): {verdict}")
    words += [f"{holding} of {len(claim.bounds)} bounds hold"]
    return "<br>".join(words)


def digest(claims: tuple[Claim, ...], folder: Path, page: str) -> str:
    """Returns the verdicts with what they follow from, as a Markdown table.

    page: where each claim's section is.
    """
    lines = head("claim", "paper", "seeds", "verdict", "bounds that fail or are undecided")
    for claim in claims:
        tables = tables_of(claim, read_results(folder, claim))
        link = f"[{claim.name}]({page}#{claim.name}): {claim.says}"
        figures = in_short(claim, tables) if tables else "-"
        verdict = f"**{verdict_of(claim, tables)}**"
        lines.append(line(link, claim.paper, names(tables), verdict, figures))
    return "\n".join(lines) + "\n"


def report(claims: tuple[Claim, ...], folder: Path) -> str:
    """Returns all claims as Markdown: the verdicts, then each with its figures."""
    results = {claim.name: read_results(folder, claim) for claim in claims}
    lines = overview(claims, results)
    for claim in claims:
        lines += ["", *section(claim, results[claim.name])]
    return "\n".join(lines) + "\n"
