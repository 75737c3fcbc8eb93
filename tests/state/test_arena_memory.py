"""Memory of plane arenas: zero where promised, in huge pages where the system has them on request."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alignedkv_compile import arena_memory
from alignedkv_compile.arena_memory import HUGE_PAGE, unwritten_arena, zeroed_arena

CPU = torch.device("cpu")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("total", [0, 64, HUGE_PAGE - 1, 3 * HUGE_PAGE + 17])
def test_a_zeroed_arena_is_zero(total: int) -> None:
    torch.full((total,), 7, dtype=torch.uint8)  # what the allocator may hand out again
    arena = zeroed_arena(total, CPU)
    assert arena.shape == (total,)
    assert arena.dtype == torch.uint8
    assert not arena.any()


@pytest.mark.skipif(not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no transparent huge pages here")
def test_the_pages_of_a_large_arena_are_asked_to_be_huge() -> None:
    arena = unwritten_arena(40 * HUGE_PAGE, CPU)
    assert "hg" in _flags_at(arena.data_ptr() + arena.nbytes // 2)


def test_what_is_asked_for_lies_within_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(arena_memory, "_advise", lambda: lambda start, length: asked.append((start, length)))
    arena = zeroed_arena(2 * HUGE_PAGE + 5, CPU)
    zeroed_arena(HUGE_PAGE - 1, CPU)
    ((start, length),) = asked
    assert start % mmap.PAGESIZE == 0
    assert 0 <= start - arena.data_ptr() < mmap.PAGESIZE
    assert start + length == arena.data_ptr() + arena.nbytes


def test_a_fake_arena_has_no_memory_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_memory, "_advise", lambda: pytest.fail("asked for pages of a fake tensor"))
    with FakeTensorMode():
        assert zeroed_arena(2 * HUGE_PAGE, CPU).shape == (2 * HUGE_PAGE,)


def test_a_compiled_function_may_make_one() -> None:
    made = torch.compile(lambda: zeroed_arena(2 * HUGE_PAGE, CPU) + 1, backend="eager", fullgraph=True)()
    assert torch.equal(made, torch.ones(2 * HUGE_PAGE, dtype=torch.uint8))


def _flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    pytest.fail("no mapping holds the arena")
