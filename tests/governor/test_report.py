"""The report says what happened: in text to the letter, on the page in numbers and in the places of its marks."""

from __future__ import annotations

import html.parser
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from morphogen.governor import Finding, GovernorConfig, LevelShiftAccepted, Rollback, StepSkipped
from morphogen.governor.events import Collapsed, PartQuarantined
from morphogen.governor.report import GovernorReport, GovernorSummary
from morphogen.governor.report.chart import axis_of, thinned
from morphogen.governor.report.timeline import Bucket, Timeline
from morphogen.governor.report.words import number_text

HIGH = Finding(detector="explosion", message="loss 9 exceeds 4, the limit set by its recent past", value=9.0, threshold=4.0)
NAN = Finding(detector="non_finite", message="loss is nan", value=math.nan, non_finite=True)
HOSTILE = Finding(
    detector='<b onclick="x()">', message="</svg><script>alert('1')</script> & \x1b[31mred\n" + "long " * 60, value=math.inf
)


class Kept(NamedTuple):
    """A generation of the ring, its snapshot aside."""

    observed: int
    step: int
    good: bool


def rollback(from_step: int, to_step: int, *findings: Finding, factor: float = 1.0) -> Rollback:
    return Rollback(
        step=from_step,
        reason=findings[0].message,
        findings=findings,
        from_step=from_step,
        to_step=to_step,
        parts=("model", "optimizer"),
        optimizer_strategy="restore",
        learning_rate_factor=factor,
        penalty=10.0,
        count=1,
    )


def summary_of(timeline: Timeline, status: str = "healthy") -> GovernorSummary:
    history = timeline.history()
    return GovernorSummary(
        observations=history.observed,
        skipped_steps=history.skips.count,
        rewinds=history.rewinds.count,
        status=status,
        detectors=("non_finite", "explosion"),
        config=GovernorConfig().model_dump(mode="json"),
    )


def small() -> Timeline:
    """Twelve observations: a spike skipped at the 5th, NaN at the 8th, back to the snapshot of the 3rd."""
    timeline = Timeline()
    timeline.record_generations(0, [Kept(0, 0, True)])
    losses = (4.0, 3.5, 3.0, 2.5, 9.0, 2.0, 1.75, math.nan, 3.0, 2.5, 2.0, 1.5)
    steps = (0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6)
    for observed, (step, loss) in enumerate(zip(steps, losses, strict=True), start=1):
        timeline.record_loss(observed, step, loss)
        if observed == 3:
            timeline.record_generations(3, [Kept(0, 0, True), Kept(3, 2, False)])
        if observed == 5:
            timeline.record(5, StepSkipped(step=4, reason=HIGH.message, findings=(HIGH,)))
        if observed == 7:
            timeline.record_generations(7, [Kept(0, 0, True), Kept(3, 2, True)])
        if observed == 8:
            timeline.record(8, rollback(7, 2, NAN, factor=0.5))
            timeline.record_generations(8, [Kept(0, 0, True), Kept(3, 2, True)])
    return timeline


def report_of(timeline: Timeline, status: str = "healthy") -> GovernorReport:
    return GovernorReport(timeline.history(), summary_of(timeline, status))


def run_of(losses: Sequence[float]) -> Timeline:
    timeline = Timeline()
    for observed, loss in enumerate(losses, start=1):
        timeline.record_loss(observed, observed - 1, loss)
    return timeline


def hostile() -> GovernorReport:
    timeline = small()
    timeline.record(12, StepSkipped(step=6, reason=HOSTILE.message, findings=(HOSTILE,)))
    timeline.record(12, rollback(6, 2, HOSTILE))
    timeline.record(12, LevelShiftAccepted(step=6, findings=(HOSTILE,)))
    timeline.record(12, PartQuarantined(step=6, owner="<i>slot</i>", findings=(HOSTILE,), penalty=1.0))
    timeline.record(12, Collapsed(step=6, reason=HOSTILE.message, findings=(HOSTILE,), to_step=0, rewinds=1))
    summary = summary_of(timeline)
    return GovernorReport(
        timeline.history(),
        GovernorSummary(
            observations=12, skipped_steps=2, rewinds=2, status="<u>odd</u>", detectors=("<s>mine</s>",), config=summary.config
        ),
    )


# Text

SMALL_TEXT = """\
healthy: 12 observations, 1 step skipped, 1 rewind

Loss: first 4, last 1.5, lowest 1.5, highest 9, 1 not finite
          9     █
                █
            ▃▁  █
        1.5 ██▇▅█▃▂ ▇▅▃▁
    rewinds   ◂────┘
    skipped     ×
 not finite        !
observation 1         12
            (bars: highest loss)

Rewinds (1)
  #  observation  from step  to step  optimizer  learning rate  evidence
  1            8          7        2  restore            × 0.5  non_finite: loss is nan

Findings (2)
  step  detector    value  threshold  outcome  message
     4  explosion       9          4  skipped  loss 9 exceeds 4, the limit set by its recent past
     7  non_finite    NaN          –  rewound  loss is nan

Snapshots kept (2)
  step  observations ago  state
     2                 9  good: a rewind may go there
     0                12  good: a rewind may go there

Detectors: non_finite, explosion
"""


def test_the_text_of_a_small_run_to_the_letter() -> None:
    report = report_of(small())
    assert report.text() == SMALL_TEXT.rstrip("\n")
    assert str(report) == report.text()


def test_nothing_observed_yet() -> None:
    report = GovernorReport(Timeline().history(), GovernorSummary(observations=0, skipped_steps=0, rewinds=0, status="healthy"))
    assert report.text() == "nothing observed yet"
    assert "Nothing observed yet" in report.html()
    assert "<svg" not in report.html()


def test_a_collapse_says_what_to_do_next() -> None:
    timeline = small()
    timeline.record(12, Collapsed(step=6, reason=NAN.message, findings=(NAN,), to_step=2, rewinds=1))
    lines = report_of(timeline).text().splitlines()
    assert lines[:5] == [
        "collapsed: 12 observations, 1 step skipped, 1 rewind",
        "",
        "Collapsed at step 6: loss is nan",
        "",
        "What to do next",
    ]
    words = " ".join(report_of(timeline).text().split())
    assert "it showed at steps 6 to 7. Look at the batches" in words
    assert "left at the snapshot of step 2." in words
    assert "set_detect_anomaly(True)" in words
    timeline.record_loss(13, 7, 1.0)
    assert "What to do next" not in report_of(timeline).text(), "the run went on"


def test_a_collapse_of_finite_losses_advises_otherwise() -> None:
    timeline = small()
    timeline.record(12, Collapsed(step=6, reason=HIGH.message, findings=(HIGH,), to_step=2, rewinds=0))
    text = report_of(timeline).text()
    assert "clip gradients" in text
    assert "set_detect_anomaly" not in text


MESSAGES = st.text(max_size=300)
VALUES = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(VALUES, min_size=1, max_size=150), message=MESSAGES, value=VALUES, name=MESSAGES)
def test_any_run_fits_the_terminal_and_makes_a_page(losses: list[float], message: str, value: float, name: str) -> None:
    timeline = run_of(losses)
    finding = Finding(detector=name, message=message, value=value, threshold=value)
    timeline.record(len(losses), StepSkipped(step=3, reason=message, findings=(finding,)))
    timeline.record(len(losses), rollback(3, 0, finding))
    report = report_of(timeline, status=name)
    lines = report.text().split("\n")
    assert all(len(line) <= 100 for line in lines)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs") for line in lines for letter in line)
    root = Page(report.html())
    assert not re.search(r"nan|inf", " ".join(attributes.get("d", "") for _, attributes in root.tags))


# The page


class Page(html.parser.HTMLParser):
    """The tags and the text of a page; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def of_class(self, name: str) -> Iterator[dict[str, str]]:
        return (attributes for _, attributes in self.tags if name in attributes.get("class", "").split())

    def text_in(self, tag: str) -> list[str]:
        return [text for where, text in self.words if where == tag]


def place(sign: dict[str, str]) -> float:
    found = re.match(r"translate\((\S+) ", sign["transform"])
    assert found is not None
    return float(found[1])


def test_marks_lie_where_things_happened() -> None:
    page = Page(report_of(small()).html())

    def x(observed: int) -> float:
        return round(96 + (750 - 96) * (observed - 1) / 11, 1)

    assert [place(sign) for sign in page.of_class("sign-finding")] == [x(5), x(8)]
    assert [place(sign) for sign in page.of_class("sign-skipped")] == [x(5)]
    assert [place(sign) for sign in page.of_class("sign-non-finite")] == [x(8)]
    assert [place(sign) for sign in page.of_class("sign-promoted")] == [x(1), x(3)]
    assert [place(sign) for sign in page.of_class("sign-rewind")] == [x(8)]
    (arc,) = page.of_class("arc")
    start, end = re.match(r"M(\S+) .* (\S+) \S+m", arc["d"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert (float(start), float(end)) == (x(8), x(3))
    assert len(list(page.of_class("loss"))) == 2, "the line is broken where the loss is not finite"


def test_the_page_shows_the_tables_and_folds_the_settings() -> None:
    page = Page(report_of(small()).html())
    cells = page.text_in("td")
    assert cells[:7] == ["1", "8", "7", "2", "restore", "× 0.5", "non_finite: loss is nan"]
    assert {"rewind-1"} == {attributes["id"] for name, attributes in page.tags if name == "tr" and "id" in attributes}
    assert "#rewind-1" in {attributes.get("href") for _, attributes in page.tags}
    assert {"Settings", "Every snapshot (2)"} <= set(page.text_in("summary"))
    assert "max_rewinds: 4" in "".join(page.text_in("pre"))


def test_the_page_loads_nothing_and_labels_its_picture() -> None:
    text = report_of(small()).html()
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<img|<iframe|\bsrc=|\bon\w+=", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    labels = [attributes["aria-label"] for name, attributes in page.tags if name == "svg"]
    assert labels == [
        "Loss over 12 observations: first 4, last 1.5, lowest 1.5, highest 9, 1 not finite; "
        "1 rewinds, 1 skipped steps, 2 findings"
    ]


def test_what_a_detector_says_is_text_and_nothing_else() -> None:
    page = Page(hostile().html())
    names = {name for name, _ in page.tags}
    assert not names & {"b", "i", "s", "u"}
    assert [name for name, _ in page.tags].count("script") == 1, "the page's own"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert any("<script>alert('1')</script> & �[31mred long" in text for text in page.text_in("td"))


# Axes


def buckets(*values: float) -> list[Bucket]:
    return [Bucket(index, index, value, value, value, 0) for index, value in enumerate(values, start=1)]


def test_the_axis_is_logarithmic_only_for_positive_losses_over_two_decades() -> None:
    assert axis_of(buckets(0.01, 1.01)).is_log
    assert not axis_of(buckets(0.01, 1.0)).is_log
    assert not axis_of(buckets(0.0, 1.0, 500.0)).is_log
    assert not axis_of(buckets(-1.0, 500.0)).is_log
    assert axis_of(buckets(0.01, 10.0)).ticks == (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@pytest.mark.parametrize("losses", [(1.7e308,), (-1.7e308, 1.7e308), (0.0, 5e-324), (5e-324, 1.7e308), (2.0, 2.0)])
def test_the_largest_and_the_smallest_losses_are_drawn(losses: tuple[float, ...]) -> None:
    report = report_of(run_of(losses))
    assert "█" in report.text() or len(set(losses)) == 1
    paths = [attributes.get("d", "") for _, attributes in Page(report.html()).tags]
    assert not re.search(r"nan|inf", " ".join(paths))


def test_rare_losses_do_not_press_the_others_to_the_floor() -> None:
    axis = axis_of(buckets(*[-1.0, 1.0] * 50, 1_000.0))
    assert (axis.low, axis.high, axis.is_cut) == (-1.0, 1.0, True)
    report = report_of(run_of([*[-1.0, 1.0] * 50, 1_000.0]))
    assert "up to 1,000" in report.html()
    assert not axis_of(buckets(*[-1.0, 1.0] * 50, 5.0)).is_cut


@given(count=st.integers(min_value=1, max_value=2_000))
def test_thinning_for_the_picture_keeps_ends_and_extremes(count: int) -> None:
    curve = buckets(*(math.sin(7 * index) for index in range(count)))
    thin = thinned(curve, 50)
    assert len(thin) <= 50
    assert (thin[0], thin[-1].observed, thin[-1].last) == (curve[0], count, curve[-1].last)
    assert min(bucket.low for bucket in thin) == min(bucket.low for bucket in curve)
    assert max(bucket.high for bucket in thin) == max(bucket.high for bucket in curve)


def test_numbers_have_four_digits_and_thousands_apart() -> None:
    values = (0, 12, 1_234_567, 0.123456, 12.3456, 1234.56, 3.2e-9, 5e12, -math.inf, math.nan, None)
    assert [number_text(value) for value in values] == [
        "0", "12", "1,234,567", "0.1235", "12.35", "1,235", "3.2e-09", "5e+12", "-inf", "NaN", "–",
    ]  # fmt: skip


# Files


def test_saving_goes_by_the_suffix(tmp_path: Path) -> None:
    report = report_of(small())
    assert report.save(tmp_path / "a.html").read_text(encoding="utf-8") == report.html()
    assert report.save(str(tmp_path / "a.txt")).read_text(encoding="utf-8") == report.text() + "\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.txt"]
    assert hostile().save(tmp_path / "b.html").is_file()


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.html.gz", "report.HTML"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"`path` must end in \.html or \.txt, got"):
        report_of(small()).save(tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_a_disk_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        report_of(small()).save(path)
    assert path.read_text() == "before"
    with pytest.raises(OSError):
        report_of(small()).save(tmp_path / "nowhere" / "report.html")
