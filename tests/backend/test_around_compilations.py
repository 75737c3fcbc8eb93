"""What is done around compilations: the C++ compiler is asked while Dynamo traces, and cycles are not collected."""

from __future__ import annotations

import contextvars
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from alignedkv_compile import torch_private
from alignedkv_compile.around_compilations import CollectorPause, install
from alignedkv_compile.head_start import HeadStart


class Work:
    """Runs until it is let go; says when it began and ended."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.runs, self.ended = 0, False

    def __call__(self) -> None:
        self.runs += 1
        self.begun.set()
        assert self.may_end.wait(10)
        self.ended = True


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """In place of what Inductor is asked for; callbacks of the test are gone after it."""
    found = Work()
    monkeypatch.setattr(torch_private, "instruction_set_checks", lambda: [found])
    monkeypatch.setattr(torch_private, "has_accelerator", lambda: False)
    torch._dynamo.reset()
    yield found
    found.may_end.set()
    torch._dynamo.reset()


def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[object], options: object = None) -> Callable[..., object]:
    return gm.forward


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_work_is_done_once_and_waited_for() -> None:
    work = Work()
    started = HeadStart(lambda: [work])
    started.wait()  # nothing was begun
    assert not work.begun.is_set()
    started.begin()
    assert work.begun.wait(10)
    threading.Timer(0.05, work.may_end.set).start()
    started.wait()
    assert work.ended
    started.begin()
    started.wait()
    assert work.runs == 1


def test_an_exception_is_left_to_whoever_needs_the_result() -> None:
    def fail() -> None:
        raise OSError("no compiler")

    done = threading.Event()
    started = HeadStart(lambda: [fail, done.set])
    started.begin()
    started.wait()
    assert done.is_set()


def test_whoever_waits_helps() -> None:
    first, done_by = Work(), []

    def second() -> None:
        done_by.append(threading.current_thread())
        first.may_end.set()

    started = HeadStart(lambda: [first, second])
    started.begin()
    assert first.begun.wait(10)
    started.wait()
    assert first.ended
    assert done_by == [threading.current_thread()]


def test_settings_of_the_thread_that_begins_hold() -> None:
    setting = contextvars.ContextVar("setting", default="default")
    seen = []
    started = HeadStart(lambda: [lambda: seen.append(setting.get())])
    setting.set("patched")
    started.begin()
    while not seen:
        time.sleep(0.001)
    started.wait()
    assert seen == ["patched"]


def test_it_begins_before_the_backend_is_called(work: Work) -> None:
    order = []

    def waits(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        order.append(work.begun.wait(10) and not work.ended)
        work.may_end.set()
        started.wait()
        order.append(work.ended)
        return gm.forward

    started = install(waits)
    torch.compile(double, backend=waits)(torch.ones(2))
    assert order == [True, True]


def test_not_for_another_backend(work: Work) -> None:
    install(backend)
    torch.compile(double, backend="eager")(torch.ones(2))
    assert not work.begun.is_set()


def test_not_where_the_options_say_how_to_compile(work: Work) -> None:
    install(backend)
    torch.compile(double, backend=backend, options={"inductor": {"cpp.simdlen": 256}})(torch.ones(2))
    assert not work.begun.is_set()
    torch._dynamo.reset()
    install(backend)
    work.may_end.set()
    torch.compile(double, backend=backend, options={"inductor": {"freezing": False}})(torch.ones(2))
    assert work.begun.is_set()


def test_not_beside_an_accelerator(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "has_accelerator", lambda: True)
    install(backend)
    torch.compile(double, backend=backend)(torch.ones(2))
    assert not work.begun.is_set()


@pytest.mark.parametrize("asked", ["announced_backend", "instruction_set_checks"])
def test_what_goes_wrong_ends_no_compilation(work: Work, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    def fails() -> None:
        failures.append(asked)
        raise AttributeError("another release of torch")

    failures: list[str] = []
    monkeypatch.setattr(torch_private, asked, fails)
    started = install(backend)
    assert torch.compile(double, backend=backend)(torch.ones(2)).tolist() == [2, 2]
    started.wait()
    assert failures == [asked]


def test_a_compilation_that_never_gets_to_its_backend_waits_at_its_end(work: Work) -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    def unused(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        raise AssertionError("there is nothing to compile")

    install(unused)
    threading.Timer(0.05, work.may_end.set).start()
    torch.compile(breaks, backend=unused)(torch.ones(2))
    assert work.begun.is_set()
    assert work.ended


def test_instruction_sets_are_known_when_the_backend_has_waited() -> None:
    """In a process of its own, since Inductor finds them out once."""
    script = """
import torch
import alignedkv_compile.backend as module
from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list

rewrite = module._compile_rewritten

def checked(*args, **kwargs):
    VecISA.check_build = None
    valid_vec_isa_list()
    print("known")
    return rewrite(*args, **kwargs)

module._compile_rewritten = checked
print(torch.compile(lambda x: 2 * x, backend="alignedkv")(torch.ones(2)).tolist())
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["known", "[2.0, 2.0]"]


@pytest.fixture
def collector() -> Iterator[None]:
    """On before the test and after it, with nothing frozen."""
    gc.enable()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()


class Cycle:
    """Goes with the collector only."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_a_pause(collector: None, enabled: bool) -> None:
    if not enabled:
        gc.disable()
    pause = CollectorPause()
    pause.end()  # nothing was begun
    for _ in range(2):
        assert gc.isenabled() is enabled
        pause.begin()
        assert not gc.isenabled()
        pause.end()
    assert gc.isenabled() is enabled


def test_cycles_of_a_pause_are_collected_at_its_end(collector: None) -> None:
    pause = CollectorPause()
    pause.begin()
    alive = weakref.ref(Cycle())
    assert alive() is not None
    pause.end()
    assert alive() is None


def test_what_stays_is_old_and_no_reason_for_a_full_collection(collector: None) -> None:
    full_collections = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full_collections.append(info)

    pause = CollectorPause()
    pause.begin()
    kept = [[] for _ in range(2 * len(gc.get_objects()))]  # far more than a quarter
    pause.end()
    assert gc.get_freeze_count() == 0
    assert any(each is kept for each in gc.get_objects(generation=2))
    gc.callbacks.append(note)
    try:
        passing = [[] for _ in range(100_000)]
    finally:
        gc.callbacks.remove(note)
    assert full_collections == []
    assert len(kept) > len(passing)


def test_what_a_user_froze_stays_frozen(collector: None) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    pause = CollectorPause()
    pause.begin()
    pause.end()
    assert gc.get_freeze_count() >= frozen > 0
    assert gc.isenabled()


def test_cycles_are_not_collected_while_a_graph_of_ours_is_compiled(work: Work, collector: None) -> None:
    seen = []

    def sees(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        seen.append(gc.isenabled())
        if len(seen) > 1:
            raise RuntimeError("cannot compile")
        return gm.forward

    install(sees)
    work.may_end.set()
    torch.compile(double, backend=sees)(torch.ones(2))
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="cannot compile"):
        torch.compile(lambda x: 3 * x, backend=sees)(torch.ones(2))
    assert seen == [False, False]
    assert gc.isenabled()


def test_cycles_are_collected_while_another_backend_compiles(work: Work, collector: None) -> None:
    seen = []

    def sees(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        seen.append(gc.isenabled())
        return gm.forward

    install(backend)
    torch.compile(double, backend=sees)(torch.ones(2))
    assert seen == [True]
