"""Old against new: medians of the repetitions, a limit, and what their spread leaves undecided."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import ComparisonError
from .metrics import METRICS
from .quantities import Quantity

DEFAULT_LIMIT = 0.05
"""How much worse a figure may get when no limit is given."""
QUARTILES_FROM = 4
"""With fewer samples the spread is their range, else the distance between the quartiles."""


class Verdict(enum.Enum):
    """What became of a quantity; the value is what tables say."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    WITHIN_NOISE = "within noise"
    """It moved by more than the limit, and by no more than its repetitions differ among themselves."""
    NO_REPEATS = "not repeated"
    """A time that moved by more than the limit, measured once: nobody knows its noise."""
    CONTROL = "control"
    """Not ours; it moved by more than the limit and its noise, which tells of the machine or of torch."""
    OTHER_MACHINE = "other machine"
    GONE = "gone"
    """The new runs lack what the old ones have."""
    NEW = "new"


FAILING = (Verdict.WORSE, Verdict.GONE)


@dataclass(frozen=True)
class Summary:
    """The repetitions of one quantity.

    Attributes:
        median: of the files' medians.
        spread: how far repetitions differ: the range of the files' medians, or, with a single file, the distance between the
            quartiles of its samples (the range of fewer than :data:`QUARTILES_FROM`); None with one sample in all.
    """

    median: float
    spread: float | None


@dataclass(frozen=True)
class Change:
    """A quantity before and after.

    Attributes:
        quantity: of the new runs, or of the old ones when it is gone.
        old, new: None on the side that lacks it.
        relative: ``(new - old) / |old|``; infinite when ``old`` is 0 and ``new`` is not; 0 when a side lacks it.
        verdict: what this means.
    """

    quantity: Quantity
    old: Summary | None
    new: Summary | None
    relative: float
    verdict: Verdict


@dataclass(frozen=True)
class Limits:
    """How much worse a quantity may get, as shares: ``default``, or that of its metric in ``by_metric``."""

    default: float
    by_metric: Mapping[str, float]

    def of(self, metric: str) -> float:
        """The limit of a metric."""
        return self.by_metric.get(metric, self.default)


def parse_limits(texts: Sequence[str]) -> Limits:
    """``["5%", "kl_mean=20%"]`` as :class:`Limits`.

    Raises:
        ComparisonError: not of that form, or an unknown metric.
    """
    default, by_metric = DEFAULT_LIMIT, dict[str, float]()
    for text in texts:
        name, separator, value = text.rpartition("=")
        if separator and name not in METRICS:
            raise ComparisonError(f"--fail-above knows no metric {name!r}; it knows {', '.join(METRICS)}")
        try:
            limit = float(value.removesuffix("%")) / 100
        except ValueError:
            limit = math.nan
        if not value.endswith("%") or not 0 <= limit < math.inf:
            raise ComparisonError(f"--fail-above {text!r} is not a percentage such as 5% or kl_mean=20%")
        if separator:
            by_metric[name] = limit
        else:
            default = limit
    return Limits(default, by_metric)


def judge(
    old: Sequence[Sequence[Quantity]], new: Sequence[Sequence[Quantity]], limits: Limits, *, times_count: bool
) -> tuple[Change, ...]:
    """Compare every quantity.

    Args:
        old, new: the quantities of each file.
        limits: how much worse each may get.
        times_count: whether old and new ran on one machine.
    """
    before, after = _by_key(old), _by_key(new)
    return tuple(_change(before.get(key, []), after.get(key, []), limits, times_count) for key in {**before, **after})


def _by_key(files: Sequence[Sequence[Quantity]]) -> dict[tuple[str, str], list[Quantity]]:
    found: dict[tuple[str, str], list[Quantity]] = {}
    for file in files:
        for quantity in file:
            found.setdefault(quantity.key, []).append(quantity)
    return found


def _change(old: Sequence[Quantity], new: Sequence[Quantity], limits: Limits, times_count: bool) -> Change:
    if not new:
        return Change(old[0], summarize(old), None, 0.0, Verdict.CONTROL if old[0].control else Verdict.GONE)
    if not old:
        return Change(new[0], None, summarize(new), 0.0, Verdict.NEW)
    before, after, quantity = summarize(old), summarize(new), new[0]
    relative = _relative(before.median, after.median)
    verdict = _verdict(quantity, before, after, relative, limits.of(quantity.metric), times_count)
    return Change(quantity, before, after, relative, verdict)


def summarize(repetitions: Sequence[Quantity]) -> Summary:
    """Median and spread over the files in which a quantity was found."""
    medians = [statistics.median(quantity.samples) for quantity in repetitions]
    samples = medians if len(medians) > 1 else list(repetitions[0].samples)
    if len(samples) < 2:
        spread = None
    elif len(medians) > 1 or len(samples) < QUARTILES_FROM:
        spread = max(samples) - min(samples)
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = high - low
    return Summary(statistics.median(medians), spread)


def _relative(old: float, new: float) -> float:
    if old == new:
        return 0.0
    return (new - old) / abs(old) if old else math.copysign(math.inf, new)


def _verdict(quantity: Quantity, old: Summary, new: Summary, relative: float, limit: float, times_count: bool) -> Verdict:
    metric = METRICS[quantity.metric]
    if math.isnan(old.median) or math.isnan(new.median):
        return Verdict.SAME if math.isnan(old.median) == math.isnan(new.median) else Verdict.WORSE
    if abs(relative) <= limit:
        return Verdict.SAME
    if metric.timed and not times_count:
        return Verdict.OTHER_MACHINE
    if metric.timed and (old.spread is None or new.spread is None):
        return Verdict.NO_REPEATS
    if abs(new.median - old.median) <= max(old.spread or 0.0, new.spread or 0.0):
        return Verdict.WITHIN_NOISE
    if quantity.control:
        return Verdict.CONTROL
    return Verdict.BETTER if (relative > 0) == metric.higher_is_better else Verdict.WORSE
