"""From which context on, and up to how many bytes, the aligned read is the faster one, by times that are made up."""

from __future__ import annotations

import math

import pytest

from alignedkv_compile.break_even import LEAST_CONTEXT, NEVER
from alignedkv_compile.cost.crossover import FARTHEST, MARGIN, Timing, break_even, least_context


def timings(*ratios: float, first: int = 1024) -> list[Timing]:
    """Of an aligned read that takes so many times what the stream does."""
    return [Timing(first << number, time, 1.0, time) for number, time in enumerate(ratios)]


def test_one_context_says_whether_there_is_a_gain() -> None:
    assert least_context(timings(0.99)) == 1024
    assert least_context(timings(1.01)) == NEVER


@pytest.mark.parametrize("busy", range(6))
def test_a_machine_that_was_busy_at_one_context_does_not_decide(busy: int) -> None:
    quiet = [1.4, 1.2, 1.03, 0.88, 0.76, 0.65]
    disturbed = [ratio * 1.15 if number == busy else ratio for number, ratio in enumerate(quiet)]
    assert least_context(timings(*quiet)) == pytest.approx(4700, rel=0.03)
    assert least_context(timings(*disturbed)) == pytest.approx(4700, rel=0.3)


def test_what_lies_on_a_parabola_is_left_as_it_is() -> None:
    """log(ratio) is 1 - 2 n + n^2 / 4 at the n-th context."""
    ratios = [math.exp(1 - 2 * n + n * n / 4) for n in range(6)]
    assert least_context(timings(*ratios)) == pytest.approx(1024 * 2 ** (1 / 1.75), abs=2), "between 1 and -0.75"


def test_between_two_contexts_it_is_where_the_line_of_the_logarithms_crosses() -> None:
    assert least_context(timings(2.0, 0.5)) == pytest.approx(1024 * 2**0.5, abs=1)
    assert least_context(timings(4.0, 2.0, 1.0, 0.5)) == pytest.approx(4096, abs=1)


def test_a_gain_counts_only_where_every_longer_context_gains() -> None:
    assert least_context(timings(0.9, 1.1, 0.9)) == pytest.approx(2048 * 2**0.5, rel=0.05)


def test_gains_from_the_first_context_on() -> None:
    assert least_context(timings(0.9, 0.8, 0.7)) == 1024
    assert least_context(timings(0.5, first=16)) == LEAST_CONTEXT


def test_a_trend_is_followed_a_little_way() -> None:
    slow = timings(1.21, 1.1, 1.0 + 1e-9)
    assert least_context(slow) == pytest.approx(4096, rel=0.01)
    assert least_context(timings(1.5, 1.25, 1.125)) == pytest.approx(4096 * 2**0.9, rel=0.3)
    beyond = least_context(timings(1.6, 1.4, 1.25))
    assert 4096 < beyond < 4096 * FARTHEST


@pytest.mark.parametrize("ratios", [(1.3, 1.3, 1.3), (1.1, 1.2, 1.3), (1.2,), (1.32, 1.31, 1.30), (0.9, 1.0, 1.2)])
def test_without_a_trend_to_a_gain_it_is_never(ratios: tuple[float, ...]) -> None:
    assert least_context(timings(*ratios)) == NEVER


def measured(*layers: tuple[float, float]) -> list[Timing]:
    """At one context, by share and ratio of each layer."""
    return [Timing(4096, 1.0, 1.0, 1.0, layers)]


def test_a_head_may_lose_as_much_as_the_margin() -> None:
    line = [(share, MARGIN + 2.5 * (share - 0.3)) for share in (0.2, 0.25, 0.35, 0.5)]
    assert break_even(measured(*line)) == pytest.approx(0.3)
    assert break_even([*measured(*line[:2]), *measured(*line[2:])]) == pytest.approx(0.3)


def test_layers_near_it_count_most() -> None:
    near = [(0.28, MARGIN - 0.05), (0.32, MARGIN + 0.05)]
    assert break_even(measured(*near)) == pytest.approx(0.3, abs=0.001)
    assert break_even(measured(*near, (0.9, MARGIN + 0.5))) == pytest.approx(0.3, abs=0.03), "a straight line of all is at 0.25"


def test_no_share_is_more_than_all_bytes() -> None:
    assert break_even(measured((0.2, 0.5), (0.3, 0.52))) == 1
    assert break_even(measured((0.5, 3.0), (0.6, 3.1))) == 0, "it never pays"


@pytest.mark.parametrize("layers", [(), ((0.3, 1.1),), ((0.3, 1.1), (0.3, 1.2)), ((0.2, 1.1), (0.4, 1.0))])
def test_times_that_do_not_grow_with_the_bytes_say_nothing(layers: tuple[tuple[float, float], ...]) -> None:
    assert break_even(measured(*layers)) == 0
