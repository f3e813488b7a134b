"""Limits and profiles of made-up runs against closed forms."""

from __future__ import annotations

import pytest

from localds.limits import OUTSIDE, Peaks, Step, add_up, least_time, profile_rows

PEAKS = Peaks(read=10e9, int8=400e9, floats=100e9)


def step(name: str, **figures: int) -> Step:
    work = {"calls": 1, "bytes": 0, "int8": 0, "floats": 0} | figures
    return Step(name=name, seconds=0.5, **work)


def test_reading_limits_a_token() -> None:
    # 1 GB and 4e9 multiply-adds: a tenth and a hundredth of a second.
    least = least_time(
        [step("a", bytes=6 * 10**8, int8=4 * 10**9), step("b", bytes=4 * 10**8)], PEAKS
    )
    assert least.seconds == pytest.approx(0.1)
    assert least.by == "reading"


def test_arithmetic_limits_a_prompt_and_its_kinds_add_up() -> None:
    # Apart, each would be hidden by the reading.
    work = step("a", bytes=10**9, int8=24 * 10**9, floats=6 * 10**9)
    least = least_time([work], PEAKS)
    assert least.seconds == pytest.approx(24 / 400 + 6 / 100)
    assert least.by == "arithmetic"


def test_steps_without_work_change_no_limit() -> None:
    work = [step("a", bytes=10**6)]
    assert least_time([*work, step("norms")], PEAKS) == least_time(work, PEAKS)


def test_runs_add_up_by_name_in_their_first_order() -> None:
    first = [step("a", calls=2, bytes=3), step("b", int8=5)]
    second = [step("c", floats=7), step("b", int8=11), step("a", calls=4, bytes=13)]
    assert add_up([first, second]) == [
        Step("a", 6, 1.0, 16, 0, 0),
        Step("b", 2, 1.0, 0, 16, 0),
        Step("c", 1, 0.5, 0, 0, 7),
    ]
    assert add_up([]) == []


def test_rows_are_per_unit_and_rates_per_second_of_the_step() -> None:
    steps = [
        Step("a", calls=8, seconds=1.0, bytes=4 * 10**9, int8=16 * 10**9, floats=0),
        Step("b", calls=4, seconds=0.5, bytes=0, int8=0, floats=10**9),
    ]
    a, b, outside = profile_rows(steps, seconds=2.0, units=4)
    assert (a.name, a.calls, a.ms, a.share) == ("a", 2, 250, 0.5)
    assert (a.bytes, a.int8, a.floats) == (10**9, 4 * 10**9, 0)
    assert (a.gbs, a.int8_gops, a.float_gops) == (4, 16, 0)
    assert (b.calls, b.ms, b.share) == (1, 125, 0.25)
    assert (b.gbs, b.int8_gops, b.float_gops) == (0, 0, 2)
    assert (outside.name, outside.calls, outside.ms, outside.share) == (OUTSIDE, 0, 125, 0.25)
    assert (outside.gbs, outside.int8_gops, outside.float_gops) == (0, 0, 0)
