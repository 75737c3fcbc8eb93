"""What ``torch_private.py`` settles between releases of torch, whichever of them is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from alignedkv_compile import torch_private
from alignedkv_compile.torch_private import CustomGraphPass, PassSequence, PostGradPass, appended_pass, custom_graph_pass


class Recorder(CustomGraphPass):
    """Writes its name down when it runs; its identity is given."""

    def __init__(self, name: str, ran: list[str], identity: object = b"identity") -> None:
        self.name, self.ran, self.identity = name, ran, identity

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran.append(self.name)

    def uuid(self) -> Any:
        return self.identity


def test_a_sequence_runs_all_of_its_passes_in_order():
    ran: list[str] = []
    PassSequence(Recorder("first", ran), Recorder("second", ran))(torch.fx.Graph())
    assert ran == ["first", "second"]


def test_a_sequence_is_identified_by_all_of_its_passes():
    ours = PostGradPass([b"ours"])

    def identity(present: object) -> object:
        return PassSequence(Recorder("", [], present), ours).uuid()

    assert identity(b"one") == identity(b"one")
    assert identity(b"one") != identity(b"other")
    assert PassSequence(Recorder("", []), PostGradPass([b"edited"])).uuid() != PassSequence(Recorder("", []), ours).uuid()


@pytest.mark.parametrize("present", [lambda graph: None, Recorder("", [], None)], ids=["function", "no identity"])
def test_a_sequence_with_an_unidentified_pass_is_not_cached(present: Any):
    assert PassSequence(present, PostGradPass([b"ours"])).uuid() is None


@pytest.mark.skipif(not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"), reason="torch 2.12 added these passes")
def test_a_sequence_tells_a_pass_whether_this_is_inference():
    told = []

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            told.append(is_inference)

        def uuid(self) -> bytes:
            return b"aware"

    sequence = PassSequence(Aware(), PostGradPass([]))
    assert isinstance(sequence, custom_graph_pass.CustomInferenceAwareGraphPass)
    sequence(torch.fx.Graph(), is_inference=True)
    sequence(torch.fx.Graph(), is_inference=False)
    assert told == [True, False]


@pytest.mark.parametrize("several", [False, True])
def test_a_pass_is_appended_to_what_a_slot_holds(several: bool, monkeypatch: pytest.MonkeyPatch):
    """In slots that hold several passes, as since torch 2.13, and in those that hold one."""
    there, ours = Recorder("", []), PostGradPass([])
    if several:
        if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
            pytest.skip("slots of this torch hold one pass")
        assert appended_pass(None, ours) == [ours]
        assert appended_pass(there, ours) == [there, ours]
        assert appended_pass([there], ours) == [there, ours]
        return
    monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    assert appended_pass(None, ours) is ours
    sequence = appended_pass(there, ours)
    assert isinstance(sequence, torch_private.PassSequence)
    assert sequence.uuid() == (there.uuid(), ours.uuid())


def test_a_size_defines_the_symbol_that_it_is_known_to_equal() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    one, other = (torch_private.fresh_size(mode, 24, name) for name in ("one", "other"))
    symbols = {one.node.expr, other.node.expr}
    assert torch_private.defining_size(one) is one
    assert one == other  # a guard: from here on, one of both symbols stands for the other
    (symbol,) = {one.node.expr, other.node.expr}
    assert symbol in symbols
    for size in (one, other):
        defining = torch_private.defining_size(size)
        assert torch_private.placeholder_symbol(defining) == defining.node.expr == symbol
        assert defining.node.hint == 24
