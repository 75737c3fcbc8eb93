"""One scrape of an endpoint, as numbers by metric."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import AlignedKVError
from ..metrics.errors import MetricsClientError
from ..metrics.names import INFO, Metric

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise MetricsClientError("prometheus_client") from error

TIMEOUT_SECONDS = 10.0


class EndpointError(AlignedKVError, OSError):
    """There are no metrics of this backend at an address."""

    def __init__(self, url: str, why: object) -> None:
        super().__init__(f"no metrics of alignedkv at {url}: {why}. alignedkv_compile.metrics.start(port) serves them.")


@dataclass(frozen=True)
class Scrape:
    """What an endpoint said.

    Attributes:
        seconds: when, on a clock that only differences mean something of.
        values: by name of the time series and labels; a histogram's series are ``_bucket``, ``_count`` and ``_sum``.
    """

    seconds: float
    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float] = field(repr=False)

    def series(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and values of one name."""
        return ((dict(labels), value) for (found, labels), value in self.values.items() if found == name)

    def by(self, metric: Metric, label: str) -> dict[str, float]:
        """Sums over everything but one label."""
        sums: dict[str, float] = {}
        for labels, value in self.series(metric.name):
            sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return sums

    def total(self, metric: Metric) -> float:
        """The sum over all labels."""
        return sum(value for _, value in self.series(metric.name))

    def since(self, before: Scrape | None) -> Scrape:
        """The same with counters and histograms less what they were; one that has fallen was reset, and counts from zero."""
        if before is None:
            return self
        grows = ("_total", "_bucket", "_count", "_sum")
        values = {}
        for key, value in self.values.items():
            earlier = before.values.get(key, 0.0) if key[0].endswith(grows) else 0.0
            values[key] = value - earlier if value >= earlier else value
        return Scrape(self.seconds, values)


def scrape(url: str) -> Scrape:
    """Fetch and parse.

    Args:
        url: of the text endpoint; ``host:port`` alone means ``http://host:port/metrics``.

    Raises:
        EndpointError: nobody answers, or what answers has no metrics of this backend.
    """
    url = full_url(url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            text = response.read().decode()
    except (OSError, ValueError) as error:
        raise EndpointError(url, getattr(error, "reason", None) or error) from error
    return parse(text, url)


def full_url(url: str) -> str:
    """What was typed, with what may be left out."""
    url = url if "://" in url else f"http://{url}"
    scheme, _, rest = url.partition("://")
    return url if "/" in rest.rstrip("/") else f"{scheme}://{rest.rstrip('/')}/metrics"


def parse(text: str, url: str = "") -> Scrape:
    """Prometheus' text format.

    Raises:
        EndpointError: it is something else, or has no metrics of this backend.
    """
    try:
        families = list(text_string_to_metric_families(text))
    except (ValueError, IndexError, KeyError) as error:
        raise EndpointError(url, f"what answers there is no metrics in Prometheus' text format ({error})") from error
    values = {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}
    if not any(name == INFO.name for name, _ in values):
        raise EndpointError(url, f"what answers there has no {INFO.name}")
    return Scrape(time.monotonic(), values)
