"""The geometry of the charts: ticks, curves that stand, means, and coordinates that say what the numbers say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from morphogen.telemetry.report_charts import (
    Line,
    LineChart,
    Markup,
    Point,
    Scale,
    arm_lines,
    line_chart,
    mean_curve,
    nice_ticks,
    sparkline,
    stepped,
    tag,
    thinned,
    timeline,
    value_at,
)

VALUES = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)
STEPS = st.integers(min_value=0, max_value=40)
MEASURED = st.lists(st.tuples(STEPS, VALUES), max_size=40)


def path_of(line_class: str, svg: str) -> list[Point]:
    found = re.search(rf'<path d="([^"]*)" class="line {line_class}"', svg)
    assert found is not None, svg
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", found[1])]


def line(*points: Point, kind: str = "mean") -> Line:
    return Line(points=points, arm="grown", kind=kind, title="a line")


def chart(*lines: Line, is_focused: bool = False, last_step: float = 0) -> LineChart:
    return LineChart(label="metric", lines=lines, value_text="{:g}".format, is_focused=is_focused, last_step=last_step)


@given(low=VALUES, width=st.floats(min_value=1e-3, max_value=1e6))
def test_ticks_are_round_evenly_spaced_and_cover_the_values(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width)
    gaps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert ticks[0] <= low + 1e-6 * gaps[0]
    assert ticks[-1] >= low + width - 1e-6 * gaps[0]
    assert 2 <= len(ticks) <= 8
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3)
    assert f"{gaps[0]:.3e}"[:5] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_ticks_of_one_value_lie_around_it(value: float) -> None:
    assert nice_ticks(value, value)[0] < value < nice_ticks(value, value)[-1]


def test_a_scale_holds_values_within_its_ends() -> None:
    scale = Scale(10, 20, 100, 0)
    assert [scale(value) for value in (0, 10, 15, 20, 99)] == [100, 100, 50, 0, 0]
    assert Scale(5, 5, 1, 2)(5) == 1


@given(measured=MEASURED)
def test_a_timeline_keeps_the_last_word_on_each_step(measured: list[Point]) -> None:
    kept, lost = timeline(measured)
    expected: list[Point] = []
    for point in measured:
        expected = [known for known in expected if known[0] < point[0]] + [point]
    assert list(kept) == expected
    assert sorted([*kept, *(point for piece in lost for point in piece)]) == sorted(measured)
    assert all(before[0] < after[0] for piece in (kept, *lost) for before, after in zip(piece, piece[1:], strict=False))


@given(values=st.lists(VALUES, min_size=1, max_size=300), limit=st.integers(min_value=4, max_value=60))
def test_thinning_keeps_ends_and_extremes(values: list[float], limit: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thinned(points, limit)
    assert len(kept) <= limit + 2
    assert list(kept) == sorted(set(kept) & set(points))
    assert {points[0], points[-1]} <= set(kept)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


def test_a_mean_is_taken_where_all_curves_are_and_between_their_points() -> None:
    curves = [[(0, 0.0), (10, 1.0), (30, 3.0)], [(5, 1.0), (20, 1.0), (40, 9.0)]]
    assert mean_curve(curves) == ((5, 0.75), (10, 1.0), (20, 1.5), (30, 4.0))
    assert mean_curve([[], curves[0]]) == tuple(curves[0])
    assert mean_curve([]) == ()
    assert [value_at(curves[0], step) for step in (-5, 0, 5, 20, 99)] == [0.0, 0.0, 0.5, 2.0, 3.0]


def test_a_value_that_jumps_is_level_before_it() -> None:
    assert stepped([(0, 5.0), (10, 5.0), (20, 7.0)]) == ((0, 5.0), (10, 5.0), (19.5, 5.0), (20, 7.0))
    assert stepped([]) == ()


def test_lines_are_one_for_each_repeat_what_was_lost_and_a_mean_for_each_arm() -> None:
    lines = arm_lines(
        [
            ("grown", "grown, repeat 0", [(0, 1.0), (10, 2.0), (5, 3.0), (10, 4.0)]),
            ("grown", "grown, repeat 1", [(0, 1.0), (5, 5.0), (10, 6.0)]),
            ("static", "static, repeat 0", [(0, 1.0)]),
        ]
    )
    assert [(line.arm, line.kind, line.points) for line in lines] == [
        ("grown", "lost", ((10, 2.0),)),
        ("grown", "repeat", ((0, 1.0), (5, 3.0), (10, 4.0))),
        ("grown", "repeat", ((0, 1.0), (5, 5.0), (10, 6.0))),
        ("static", "repeat", ((0, 1.0),)),
        ("grown", "mean", ((0, 1.0), (5, 4.0), (10, 5.0))),
        ("static", "mean", ((0, 1.0),)),
    ]


def test_coordinates_say_what_the_numbers_say() -> None:
    svg = line_chart(chart(line((0, 0.0), (50, 0.5), (100, 1.0)), last_step=200), height=100)
    assert path_of("mean", svg) == [(60.0, 64.0), (202.5, 38.0), (345.0, 12.0)]
    assert svg.count('class="tick right">0.') == 4, "ticks from 0 to 1 by .2 lie between 0 and 1"


def test_a_focused_chart_draws_the_beginning_along_its_floor_and_says_so() -> None:
    points = tuple((float(step), 0.1 if step == 0 else 0.9 + step / 1_000) for step in range(10))
    plain, focused = (line_chart(chart(line(*points), is_focused=value)) for value in (False, True))
    assert "≤" not in plain
    assert re.search(r">≤ 0\.9\d*<", focused)
    heights = [y for _, y in path_of("mean", focused)]
    assert heights[0] == 234.0, "on the floor"
    assert heights[1] - heights[9] > 150
    assert path_of("mean", plain)[1][1] - path_of("mean", plain)[9][1] < 50


def test_labels_at_the_right_edge_do_not_touch() -> None:
    lines = tuple(Line(points=((0, 0.0), (9, 0.5 + 1e-3 * n)), arm=f"arm{n}", kind="mean", title="") for n in range(4))
    svg = line_chart(chart(*lines))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="name"', svg))
    assert len(heights) == 4
    assert all(after - before >= 13.9 for before, after in zip(heights, heights[1:], strict=False))


def test_a_chart_of_nothing_says_so() -> None:
    assert "n/a" in line_chart(chart())
    assert "n/a" in line_chart(chart(line()))
    assert "n/a" in sparkline([(0, 1.0)], [], "losses")


def test_text_and_attributes_are_escaped_once() -> None:
    inner = tag("b", '<&"')
    assert inner == "<b>&lt;&amp;&quot;</b>"
    assert tag("p", inner, 'a"<', title='"><script>', data_x=None, width=2.0) == (
        '<p title="&quot;&gt;&lt;script&gt;" width="2"><b>&lt;&amp;&quot;</b>a&quot;&lt;</p>'
    )
    assert isinstance(inner, Markup)
