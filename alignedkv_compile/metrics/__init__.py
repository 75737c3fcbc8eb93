"""What the backend costs and saves in a running process, for Prometheus or OpenTelemetry.

    import alignedkv_compile

    alignedkv_compile.metrics.start(9464)  # http://127.0.0.1:9464/metrics
    alignedkv_compile.metrics.register()   # or: into the registry that a server has already
    alignedkv_compile.metrics.instrument() # or: into OpenTelemetry's meter

The numbers are read when somebody asks for them: :mod:`.read` looks at what reports, counters and caches hold anyway, so that
a decode step does nothing for it. Two clock readings per call are the exception, for the histogram of :mod:`..call_times`.
``docs/monitoring.md`` has the table of :mod:`.names`, rules and a board.

Neither client library is imported before one of these functions is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .read import Sample, read_samples

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from prometheus_client import CollectorRegistry

    from .exposition import Registration, Server
    from .otel import Instrumentation

__all__ = ["Sample", "instrument", "read_samples", "register", "start"]


def start(port: int, addr: str = "127.0.0.1") -> Server:
    """Serve the metrics of this process over HTTP, from a thread of its own.

    Args:
        port: where to listen; 0 takes a free one, see the result's ``url``.
        addr: the interface; the default is reached from this machine only, "0.0.0.0" from everywhere. There is no access
            control: whoever reaches the port reads the numbers.

    Returns:
        The server, whose ``close()`` ends it.

    Raises:
        MetricsClientError: ``prometheus_client`` is not installed.
        MetricsAddressError: the address cannot be listened on.
    """
    from .exposition import serve

    return serve(port, addr)


def register(registry: CollectorRegistry | None = None) -> Registration:
    """Add the metrics to a registry of ``prometheus_client``, for servers that expose one already.

    Args:
        registry: None is the client's default one. A registry has the metrics once, however often it is passed.

    Returns:
        What ``close()`` takes them out again with.

    Raises:
        MetricsClientError: ``prometheus_client`` is not installed.
    """
    from .exposition import add_to

    return add_to(registry)


def instrument(provider: MeterProvider | None = None) -> Instrumentation:
    """Report the metrics through an OpenTelemetry meter, under the same names without ``_total``.

    Args:
        provider: None is the global one.

    Returns:
        What ``close()`` ends the histogram of calls with; OpenTelemetry itself never forgets an instrument.

    Raises:
        MetricsClientError: ``opentelemetry`` is not installed.
    """
    from .otel import add_instruments

    return add_instruments(provider)
