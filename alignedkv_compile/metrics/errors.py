"""What can go wrong with metrics."""

from __future__ import annotations

from ..errors import AlignedKVError

INSTALL = {"prometheus_client": "pip install 'alignedkv-compile[metrics]'", "opentelemetry": "pip install opentelemetry-sdk"}


class MetricsClientError(AlignedKVError, ImportError):
    """The client library that was asked for is not installed."""

    def __init__(self, module: str) -> None:
        super().__init__(f"{module} is not installed: {INSTALL[module]}")


class MetricsAddressError(AlignedKVError, OSError):
    """The metrics cannot be served where they should be."""

    def __init__(self, addr: str, port: int, error: Exception) -> None:
        super().__init__(
            f"cannot serve metrics on {addr}:{port}: {error}. Is another process listening there? Port 0 takes a free one."
        )
