"""Fixtures of the Triton tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton_interpreter import interpreted


@pytest.fixture
def one_compilation() -> Iterator[None]:
    """Rows are symbolic, so that a property's examples share the compiled code; it is dropped where ``interpreted`` ends."""
    with interpreted():
        yield
