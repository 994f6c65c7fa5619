"""What the claims are made of: models, figures, differences between rows."""

from collections.abc import Callable
from statistics import fmean

from micro.claim_data import shipped
from micro.experiments import Cell, Dataset, Run
from micro.reproduce import COLUMNS
from micro.verdicts import Figure, Table

HEADLINE = (0, 1, 2, 3, 4)  # the seeds of the claims that the paper stands on
FOUR = ("A text", "A image", "L text", "L image")  # trained, X-modality, X-domain, both
SIX = (*FOUR, "G text", "G image")
Rows = dict[str, dict[str, Figure]]


# --- Models ---------------------------------------------------------------------------------------


def base(seed: int, **options) -> Run:
    return Run("micro/pretrain.py", seed, options=tuple(options.items()))


def sft(start: Run, data: Dataset | None = None, **options) -> Run:
    return Run("sft.py", start.seed, start, data, tuple(options.items()))


def grpo(start: Run, data: Dataset | None = None, **options) -> Run:
    return Run("grpo.py", start.seed, start, data, tuple(options.items()))


def x_reasoner(seed: int, **options) -> Run:
    """Both stages with the shipped options, from the base of this seed."""
    return grpo(sft(base(seed, **options)))


# --- Figures --------------------------------------------------------------------------------------


def figure_of(run: Run, test: Dataset, read: Callable[[dict], float], **options) -> Figure:
    """Returns a figure that is read from a cell."""
    cell = Cell(run, test, tuple(options.items()))
    return Figure((cell,), lambda place: read(cell.read(place)))


def percent(*path: str) -> Callable[[dict], float]:
    """Returns what reads a share from a cell's figures, in %."""

    def read(figures: dict) -> float:
        for name in path:
            figures = figures[name]
        return 100 * figures

    return read


def tokens(figures: dict) -> float:
    return figures["mean_tokens"]


beyond = percent("beyond", "accuracy")  # on the questions of more than two steps
overall = percent("accuracy")


def row(run: Run, columns=FOUR, read=beyond, **options) -> dict[str, Figure]:
    """Returns a row of a table: the same figure on several test sets."""
    return {name: figure_of(run, shipped(COLUMNS[name]), read, **options) for name in columns}


# --- Differences ---


def gain(after: str, before: str, *columns: str) -> Callable[[Table], float]:
    """Returns what computes the difference of two rows, as the mean over some columns."""
    return lambda t: fmean(t[after][column] - t[before][column] for column in columns)
