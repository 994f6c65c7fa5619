"""From figures to plain verdicts: what a claim says, what would refute it, and does it hold?

A claim's figures are a table for each seed (rows, columns, numbers), and its bounds are stated
before anything is measured. A bound holds, or does not, if the mean over seeds is at least two
standard errors from it, on one side or the other; in between it is undecided. With one seed there
is no standard error, and the verdict says so.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev

from hub.errors import InputError
from micro.experiments import Cell, Place, Probe, Run
from training.journal import write_json

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "does not hold", "undecided", "not measured"
ERRORS = 2  # a mean so many standard errors from a bound is on that side of it

Table = dict[str, dict[str, float]]  # row -> column -> number


@dataclass(frozen=True)
class Figure:
    """A number of a table: what has to be there first, and how it is read from it."""

    needs: tuple[Run | Cell | Probe, ...]
    read: Callable[[Place], float]


@dataclass(frozen=True)
class Bound:
    """A figure, computed from a seed's table, and what it must be on average over the seeds."""

    text: str
    figure: Callable[[Table], float]
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
    measured on. curves: runs whose metrics.jsonl is kept beside the table, for a picture.
    """

    name: str
    paper: str
    says: str
    refuted: str
    table: Callable[[int], dict[str, dict[str, Figure]]]
    bounds: tuple[Bound, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    unit: str = "accuracy in %, questions of more than two steps (k > 2)"
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


def judge(values: list[float], bound: Bound) -> str:
    """Returns the verdict on a bound, from its figure in each seed.

    Between two limits the mean must be two standard errors from both; outside of one is enough to
    refute.
    """
    if not values:
        return MISSING
    mean, error = mean_and_error(values)
    margin = 0.0 if len(values) == 1 else ERRORS * error
    # Rounded to what is printed, so that a figure that reads as the limit is at the limit.
    low, high = round(mean - margin, 6), round(mean + margin, 6)
    if high < bound.at_least or low > bound.at_most:
        return FAILS
    return HOLDS if low >= bound.at_least and high <= bound.at_most else UNDECIDED


def overall(verdicts: list[str]) -> str:
    """Returns the verdict on a claim from those on its bounds: the weakest."""
    for verdict in (MISSING, FAILS, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return HOLDS


def verdict_of(claim: Claim, tables: list[Table]) -> str:
    """Returns the verdict on a claim, with a remark where it rests on one seed."""
    verdicts = [judge([bound.figure(table) for table in tables], bound) for bound in claim.bounds]
    remark = " (one seed)" if len(tables) == 1 else ""
    return overall(verdicts) + remark


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
    folder.mkdir(parents=True, exist_ok=True)
    seeds = read_results(folder, claim) | {str(seed): result}
    seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
    stated = {"claim": claim.says, "refuted": claim.refuted}
    write_json(folder / f"{claim.name}.json", stated | {"seeds": seeds})


def tables_of(results: dict[str, dict]) -> list[Table]:
    return [result["table"] for result in results.values()]


# --- Markdown -------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Returns the mean over seeds +- its standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} +- {error:.1f}"


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [line(*cells), line(*["---"] * len(cells))]


def overview(claims: tuple[Claim, ...], results: dict[str, dict]) -> list[str]:
    """Returns the lines of the table of all verdicts."""
    lines = head("claim", "paper", "what it says", "seeds", "verdict")
    for claim in claims:
        known = results[claim.name]
        link = f"[{claim.name}](#{claim.name})"
        verdict = f"**{verdict_of(claim, tables_of(known))}**"
        lines.append(line(link, claim.paper, claim.says, " ".join(known) or "-", verdict))
    return lines


def section(claim: Claim, results: dict[str, dict]) -> list[str]:
    """Returns the lines on one claim: what it says, its table, its bounds and the verdicts."""
    tables = tables_of(results)
    lines = [f"## {claim.name}", "", f"{claim.says} ({claim.paper})", ""]
    lines += [f"*Refuted by*: {claim.refuted}", ""]
    if not tables:
        return [*lines, f"{MISSING.capitalize()}."]
    columns = list(dict.fromkeys(column for row in tables[0].values() for column in row))
    seeds = f"seeds {' '.join(results)}" if len(tables) > 1 else f"seed {' '.join(results)} alone"
    lines += [f"{claim.unit[0].upper()}{claim.unit[1:]}; mean +- standard error, {seeds}:", ""]
    lines += head("", *columns)
    for name in tables[0]:
        cells = []
        for column in columns:
            values = [table[name][column] for table in tables if column in table.get(name, {})]
            cells.append(spread(values) if values else "-")
        lines.append(line(name, *cells))
    lines += ["", *head("bound", "stated", "measured", "each seed", "verdict")]
    for bound in claim.bounds:
        values = [bound.figure(table) for table in tables]
        each = " ".join(f"{value:.1f}" for value in values)
        verdict = judge(values, bound)
        lines.append(line(bound.text, bound.limits, spread(values), each, verdict))
    lines += ["", f"Verdict: **{verdict_of(claim, tables)}**."]
    sources = {(r["commit"] or "no git")[:7] + f", torch {r['torch']}, {r['date']}, {r['machine']}"
               for r in results.values()}  # fmt: skip
    return [*lines, "", *(f"Commit {source}." for source in sorted(sources))]


def in_short(bound: Bound, tables: list[Table]) -> str:
    """Returns a bound in a few words, in bold if it does not hold."""
    values = [bound.figure(table) for table in tables]
    verdict = judge(values, bound)
    words = f"{bound.text} {spread(values)} ({bound.limits})"
    return words if verdict == HOLDS else f"**{words}: {verdict}**"


def digest(claims: tuple[Claim, ...], folder: Path, page: str) -> str:
    """Returns the verdicts with the figures that they follow from, as a Markdown table.

    page: where each claim's section is.
    """
    lines = head("claim", "paper", "seeds", "verdict", "what it follows from (the bound)")
    for claim in claims:
        known = read_results(folder, claim)
        tables = tables_of(known)
        link = f"[{claim.name}]({page}#{claim.name}): {claim.says}"
        figures = "<br>".join(in_short(bound, tables) for bound in claim.bounds) if tables else "-"
        verdict = f"**{verdict_of(claim, tables)}**"
        lines.append(line(link, claim.paper, " ".join(known) or "-", verdict, figures))
    return "\n".join(lines) + "\n"


def report(claims: tuple[Claim, ...], folder: Path) -> str:
    """Returns all claims as Markdown: the verdicts, then each with its figures."""
    results = {claim.name: read_results(folder, claim) for claim in claims}
    lines = overview(claims, results)
    for claim in claims:
        lines += ["", *section(claim, results[claim.name])]
    return "\n".join(lines) + "\n"
