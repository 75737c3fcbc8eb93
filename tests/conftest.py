"""What every test gets: caches of its own, no network, a fresh Dynamo."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# Before torch is imported: compiled code of other runs must neither be used nor left behind. pytest-xdist's workers inherit the
# folder of the process that starts them.
_is_worker = "PYTEST_XDIST_WORKER" in os.environ
if not _is_worker:
    _caches = tempfile.mkdtemp(prefix="alignedkv-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_caches, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(_caches, "triton")
os.environ["TRITON_INTERPRET"] = "1"  # no GPU is used: generated Triton is interpreted (tests/triton)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton's own default, without its warning
os.environ["ALIGNEDKV_CALIBRATE"] = "0"  # what is compiled must not depend on what this machine is fast at
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.pop("TORCH_LOGS", None)

_quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large, hypothesis.HealthCheck.filter_too_much]
hypothesis.settings.register_profile("ci", max_examples=12, deadline=None, derandomize=True, suppress_health_check=_quiet)
hypothesis.settings.register_profile("nightly", max_examples=400, deadline=None, suppress_health_check=_quiet)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end one process would run it while the others are done."""
    items.sort(key=lambda item: "/model/" not in item.nodeid)


def pytest_unconfigure() -> None:
    if not _is_worker:
        shutil.rmtree(_caches, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        is_local = self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] == "127.0.0.1")
        if not is_local:
            raise AssertionError(f"a test tried to connect to {address!r}")
        connect(self, address)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees code, reports or counters of another; tests that never import torch pay nothing."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    if "alignedkv_compile.report" in sys.modules:
        import alignedkv_compile

        alignedkv_compile.reset_report()
