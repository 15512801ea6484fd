"""The report is read as a browser would read it: what it says, where its marks lie, and that nothing in a log harms it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import html.parser
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import ReadResult, read_records
from morphogen.telemetry.report import view_of, write_report
from morphogen.telemetry.report_page import page

Play = Callable[..., Path]
VOID = {"meta"}


@dataclasses.dataclass
class Node:
    """An element with what is in it."""

    name: str
    attributes: dict[str, str]
    children: list[Node | str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, name: str, class_: str = "") -> list[Node]:
        return [node for node in self.walk() if node.name == name and (not class_ or class_ in node.classes)]


class Tree(html.parser.HTMLParser):
    """Builds the tree and fails on a tag that is not closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(text: str) -> Node:
    return Tree(text).root


def report_of(directory: Path) -> Node:
    return parsed(write_report(directory).read_text(encoding="utf-8"))


def section(root: Node, heading: str) -> Node:
    return next(node for node in root.all("section") if node.all("h2")[0].text == heading)


def rows(node: Node) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in node.all("tr") if row.all("td")]


def points(path: Node) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attributes["d"])]


def rewrite(directory: Path, change: Callable[[dict[str, Json]], None]) -> Path:
    """Apply ``change`` to each record of the log."""
    records = read_records(directory / "events.jsonl").records
    for record in records:
        change(record)
    (directory / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


# The page as a whole


def test_the_page_loads_nothing_and_runs_its_own_script_alone(played: Play) -> None:
    text = write_report(played()).read_text(encoding="utf-8")
    root = parsed(text)
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<img|<iframe|\bsrc=|\bon\w+=", text)
    assert {node.attributes["href"][0] for node in root.walk() if "href" in node.attributes} == {"#"}
    (script,) = root.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = next(node.attributes["content"] for node in root.all("meta") if "http-equiv" in node.attributes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_ids_are_unique_and_links_lead_somewhere(played: Play) -> None:
    root = report_of(played())
    ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
    targets = [node.attributes["href"][1:] for node in root.all("a")]
    assert len(ids) == len(set(ids))
    assert len(targets) >= 5
    assert set(targets) <= set(ids)


def test_sections_stand_top_down(played: Play) -> None:
    root = report_of(played())
    assert root.all("h1")[0].text == "digits: heuristic policy"
    assert [node.text for node in root.all("h2")] == [
        "Result", "Curves", "Slots of the grown network", "Rollbacks", "Skipped steps", "Refused gates", "Configuration",
        "Run it again",
    ]  # fmt: skip
    assert len(root.all("dl", "numbers")[0].all("dt")) <= 10
    assert section(root, "Run it again").all("pre")[0].text == "morphogen grow --task digits --seed 7 --repeats 3"


def test_only_the_report_is_written(played: Play) -> None:
    directory = played()
    before = (directory / "events.jsonl").read_bytes()
    assert write_report(str(directory)) == directory / "report.html"
    assert {path.name for path in directory.iterdir()} == {"events.jsonl", "report.html"}
    assert (directory / "events.jsonl").read_bytes() == before


def test_the_same_log_gives_the_same_page(played: Play) -> None:
    directory = played()
    assert write_report(directory).read_bytes() == write_report(directory).read_bytes()


# Head and result


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        ((0.031, 0.012, 0.05), "Grown beats the static host by +3.1 points [+1.2, +5.0] over 3 paired repeats."),
        (
            (0.002, -0.004, 0.008),
            "Not significant: grown minus static host is +0.2 points [-0.4, +0.8] over 3 paired repeats, and the interval "
            "holds zero.",
        ),
        ((-0.02, -0.03, -0.01), "Grown falls short of the static host: -2.0 points [-3.0, -1.0] over 3 paired repeats."),
        ((0.0015, 0.0001, 0.003), "Grown beats the static host by +0.15 points [+0.01, +0.30] over 3 paired repeats."),
        (None, "No verdict: no repeat has both a grown network and a static host."),
    ],
)
def test_the_verdict_is_a_plain_sentence(played: Play, difference: tuple[float, float, float] | None, sentence: str) -> None:
    assert report_of(played(difference=difference)).all("p", "verdict")[0].text == sentence


def test_the_result_table_says_what_the_log_says_in_percent(played: Play) -> None:
    directory = played()
    end = read_records(directory / "events.jsonl").records[-1]
    root = report_of(directory)
    expected = []
    assert isinstance(end["rows"], list)
    for row in end["rows"]:
        assert isinstance(row, dict)
        mean, low, high = (float(str(row[name])) * 100 for name in ("mean", "low", "high"))
        interval = f"{mean:.1f}% [{low:.1f}%, {high:.1f}%]"
        flops = f"{float(str(row['train_flops'])) / 1e6:.3g} M".replace("2.1e+03 M", "2.1 G")
        rollbacks = "1" if row["arm"] == "grown" else "0"
        expected.append([row["arm"], "", interval, "3", f"{row['parameters']:,}", flops, "22.5 s", rollbacks])
    assert rows(section(root, "Result").all("table")[0]) == expected
    words = [child for node in root.all("main")[0].walk() for child in node.children if isinstance(child, str)]
    shares = [float(share) for text in words for share in re.findall(r"([\d.]+)%", text)]
    assert len(shares) > 20
    assert max(shares) <= 100


def test_every_repeat_is_listed_and_null_is_not_a_number(played: Play) -> None:
    def forget(record: dict[str, Json]) -> None:
        if record["event"] == "ArmFinished" and record["arm"] == "static":
            record["train_flops"] = None

    listed = rows(section(report_of(rewrite(played(), forget)), "Result").all("table")[1])
    assert [row[:2] for row in listed] == [[arm, str(n)] for arm in ("static", "reference", "grown") for n in range(3)]
    assert {row[5] for row in listed if row[0] == "static"} == {"n/a"}
    assert all(row[5].endswith("M") or row[5].endswith("G") for row in listed if row[0] != "static")


def test_another_metric_is_not_shown_as_percent(played: Play) -> None:
    def rename(record: dict[str, Json]) -> None:
        if record["event"] == "RunStarted":
            record["metric_name"] = "return"

    root = report_of(rewrite(played(), rename))
    assert "%" not in root.all("main")[0].text.replace("95% interval", "")
    assert "+0.031 [+0.012, +0.05]" in root.all("p", "verdict")[0].text


def test_health_counts_what_went_wrong(played: Play) -> None:
    health = [node.text for node in report_of(played()).all("ul", "health")[0].all("li")]
    assert health == [
        "✓run finished", "✓governor healthy", "!rollbacks 1", "!skipped steps 1", "·injected faults 2", "✓malformed lines 0",
    ]  # fmt: skip
    clean = report_of(played(with_faults=False)).all("ul", "health")[0].text
    assert "✓rollbacks 0" in clean


# Curves and lanes


def test_each_arm_has_a_mean_and_each_repeat_a_line_that_never_goes_back(played: Play) -> None:
    for curve in section(report_of(played()), "Curves").all("figure"):
        for arm in ("static", "reference", "grown"):
            groups = curve.all("g", f"arm-{arm}")
            assert len([path for group in groups for path in group.all("path", "mean")]) == 1
            assert len([path for group in groups for path in group.all("path", "repeat")]) == 3
        for path in curve.all("path", "line"):
            steps = [x for x, _ in points(path)]
            assert steps == sorted(steps)


def test_the_label_at_the_end_is_the_mean_of_the_repeats(played: Play) -> None:
    directory = played(with_faults=False)
    records = read_records(directory / "events.jsonl").records
    curve = section(report_of(directory), "Curves").all("figure")[0]
    for arm in ("static", "reference", "grown"):
        ends = [
            float(str(record["metric"]))
            for record in records
            if record["event"] == "TickMeasured" and (record["arm"], record["train_step"]) == (arm, 800)
        ]
        assert len(ends) == 3
        assert f"{arm} {100 * sum(ends) / 3:.1f}%" in [node.text for node in curve.all("text", "name")]


@pytest.mark.parametrize("rewinding", [True, False])
def test_a_rollback_is_marked_in_every_chart_and_lane_and_leads_to_its_story(played: Play, rewinding: bool) -> None:
    root = report_of(played(rewinding=rewinding))
    title = "grown, repeat 0: step 397 back to 337, 60 steps thrown away"
    anchor = next(node.attributes["id"] for node in root.all("details") if node.all("summary")[0].text == title)
    curves = section(root, "Curves").all("figure")
    for curve in curves:
        (mark,) = curve.all("path", "rollback")
        assert mark.text == title
        assert anchor in [node.attributes["href"][1:] for node in curve.all("a")]
        assert len(curve.all("path", "fault")) == 2
    assert [len(figure.all("path", "rewind")) for figure in section(root, "Slots of the grown network").all("figure")] == [
        1, 0, 0,
    ]  # fmt: skip
    shaded = section(root, "Slots of the grown network").all("rect", "rewound")[0].attributes
    last = 800 if rewinding else 817
    scale = (760 - 14 - 104) / last
    assert float(shaded["x"]) == pytest.approx(104 + 337 * scale, abs=0.1)
    assert float(shaded["width"]) == pytest.approx(60 * scale, abs=0.1)


def test_what_a_rollback_took_back_is_drawn_dashed_where_the_clock_goes_back(played: Play) -> None:
    assert len(section(report_of(played(rewinding=True)), "Curves").all("figure")[0].all("path", "lost")) == 1
    assert not section(report_of(played(rewinding=False)), "Curves").all("figure")[0].all("path", "lost")


def test_a_lane_is_its_stages_without_gaps(played: Play) -> None:
    blocks = section(report_of(played()), "Slots of the grown network").all("figure")
    assert [block.all("figcaption")[0].text for block in blocks] == ["Repeat 0", "Repeat 1", "Repeat 2"]
    for block in blocks:
        lanes: dict[str, list[Node]] = {}
        for bar in block.all("rect", "stage"):
            lanes.setdefault(bar.attributes["y"], []).append(bar)
        assert [[bar.classes[1].removeprefix("stage-") for bar in bars] for bars in lanes.values()] == [
            ["dormant", "germinated", "training", "blending", "holding", "fossilized"],
            [
                "dormant", "germinated", "training", "blending", "pruned", "embargoed", "resetting", "dormant", "germinated",
                "training", "blending", "holding", "fossilized",
            ],
        ]  # fmt: skip
        for bars in lanes.values():
            ends = [float(bar.attributes["x"]) + float(bar.attributes["width"]) for bar in bars]
            assert float(bars[0].attributes["x"]) == 104.0
            assert [float(bar.attributes["x"]) for bar in bars[1:]] == pytest.approx(ends[:-1], abs=0.11)
        for alpha in block.all("path", "alpha"):
            steps, heights = zip(*points(alpha), strict=True)
            assert list(steps) == sorted(steps)
            assert max(heights) - min(heights) <= 15.0


def test_births_are_named_and_a_prune_leads_to_its_reason(played: Play) -> None:
    root = report_of(played())
    block = section(root, "Slots of the grown network").all("figure")[1]
    assert [node.text.split(" at ")[0] for node in block.all("text", "birth")] == [
        "conv3x3", "squeeze_excite", "squeeze_excite",
    ]  # fmt: skip
    (link,) = [node for node in block.all("a") if node.all("path", "prune")]
    (row,) = [node for node in root.all("tr") if node.attributes.get("id") == link.attributes["href"][1:]]
    assert [cell.text for cell in row.all("td")] == [
        "300", "15", "late", "blending → pruned", "3 ticks", "", "prune asked", "prune: contribution -0.8 points",
    ]  # fmt: skip


# Rollbacks, skips, gates


def test_the_story_of_a_rollback_is_whole(played: Play) -> None:
    story = section(report_of(played()), "Rollbacks")
    names, values = ([node.text for node in story.all("dl", "facts")[0].all(name)] for name in ("dt", "dd"))
    assert dict(zip(names, values, strict=True)) == {
        "reason": "loss exploded",
        "injected in these steps": ("nan injected at step 385: loss of one batch; spike injected at step 393: weights times 8"),
        "action before it": "advance late at step 320: metric has levelled",
        "parts restored": "model, optimizer, scheduler, generators",
        "optimizer": "restore",
        "learning rates times": "0.5",
        "penalty": "0.25",
        "rewinds in a row": "1",
        "governor's own count": "397 back to 337",
    }
    assert rows(story) == [["explosion", "41.25", "6", "50", "41 MADs above"]]
    (curve,) = story.all("path", "spark")
    assert len(points(curve)) >= 12


def test_a_run_without_faults_says_none(played: Play) -> None:
    root = report_of(played(with_faults=False))
    for heading in ("Rollbacks", "Skipped steps"):
        assert section(root, heading).all("p")[0].text == "None."


def test_skipped_steps_and_refused_gates_are_grouped(played: Play) -> None:
    root = report_of(played(repeats=1))
    assert rows(section(root, "Skipped steps")) == [
        ["grown, repeat 0", "non-finite loss", "non_finite", "loss is nan", "1", "385", "385"]
    ]
    assert rows(section(root, "Refused gates")) == [
        ["grown", "late", "blending", "gradient share 0.29 below 0.50", "4"],
        ["grown", "late", "blending", "4 of 5 ticks trained", "4"],
        ["grown", "early", "blending", "gradient share 0.09 below 0.50", "3"],
        ["grown", "early", "blending", "4 of 5 ticks trained", "3"],
    ]


# Logs that are not whole, and logs that mean harm


EVIL = "\"'><script>alert(1)</script><b onclick=x>&amp;"


def test_what_a_log_says_cannot_become_markup(played: Play) -> None:
    def poison(value: Json) -> Json:
        if isinstance(value, dict):
            return {(EVIL if key in ("early", "seed") else key): poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return EVIL if isinstance(value, str) and value not in KEPT else value

    kinds = {
        "RunStarted", "ArmStarted", "TickMeasured", "Decided", "StageChanged", "GateRefused", "StepSkipped", "Rollback",
        "FaultInjected", "ArmFinished", "RunFinished",
    }  # fmt: skip
    KEPT = kinds | {"grown", "static", "reference", "accuracy", "germinated", "pruned", "wait", "prune"}

    def change(record: dict[str, Json]) -> None:
        poisoned = poison(dict(record))
        assert isinstance(poisoned, dict)
        record.clear()
        record.update(poisoned)

    directory = rewrite(played(), change)
    for name in ("config.yaml", "summary.json"):
        (directory / name).write_text(EVIL)
    root = report_of(directory)
    assert len(root.all("script")) == 1
    assert not [node for node in root.walk() if any(name.startswith("on") for name in node.attributes)]
    assert root.all("title")[0].text == f"{EVIL}: {EVIL} policy"
    assert section(root, "Configuration").all("pre")[0].text == EVIL
    slots = [node.all("title")[0].text for node in root.all("text", "slot")]
    assert slots == [EVIL, "late"] * 3
    assert section(root, "Run it again").all("pre")[0].text == EVIL


def test_an_empty_log_gives_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"")
    root = report_of(tmp_path)
    assert root.all("h1")[0].text == "morphogen run"
    assert root.all("p", "verdict")[0].text.startswith("The log holds no records yet.")
    assert not root.all("section")


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`run_directory` must hold events\.jsonl, got .* Give the directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_running_run_says_where_it_is(played: Play) -> None:
    directory = played(finishes=False)
    lines = (directory / "events.jsonl").read_bytes().split(b"\n")
    step = next(n for n, line in enumerate(lines) if b'"repeat":1' in line and b'"arm":"grown"' in line and b'"tick":9' in line)
    (directory / "events.jsonl").write_bytes(b"\n".join(lines[: step + 1]) + b'\n{"event":"Tick')
    root = report_of(directory)
    assert root.all("p", "verdict")[0].text == (
        "No verdict yet: the run has not finished (1 of 3 repeats of the grown network done)."
    )
    assert "!run not finished: grown, repeat 1, step 180 of 800" in root.all("ul", "health")[0].text
    table = rows(section(root, "Result").all("table")[0])
    assert [(row[0], row[3]) for row in table] == [("static", "3"), ("reference", "3"), ("grown", "1")]
    assert all(row[2].endswith("% [n/a]") for row in table)
    assert "The last line of the log is not complete" in root.all("footer")[0].text
    assert len(section(root, "Slots of the grown network").all("figure")) == 2


def test_any_beginning_of_a_log_gives_a_page(played: Play) -> None:
    records = read_records(played(repeats=1) / "events.jsonl").records
    for count in range(0, len(records), 7):
        assert parsed(page(view_of(ReadResult(records=records[:count], malformed_count=0), name="run"))).all("h1")


def test_malformed_lines_and_unknown_records_are_told(played: Play) -> None:
    directory = played()
    with (directory / "events.jsonl").open("a") as log:
        log.write('broken\n[]\n{"event":"LevelShiftAccepted"}\n')
    root = report_of(directory)
    assert "✕malformed lines 2" in root.all("ul", "health")[0].text
    assert [node.text for node in root.all("footer")[0].all("p")] == [
        "Malformed log lines, left out here: 2.",
        "Records of other kinds, not shown: LevelShiftAccepted 1.",
    ]


def test_values_that_are_not_finite_leave_the_charts_whole(played: Play) -> None:
    def spoil(record: dict[str, Json]) -> None:
        if record["event"] == "TickMeasured" and record["tick"] in (5, 6):
            record["metric"], record["train_loss"] = "nan", "inf"
        if record["event"] == "ArmFinished" and record["arm"] == "static":
            record["test_metric"] = "nan"

    root = report_of(rewrite(played(), spoil))
    assert not re.search(r"nan|inf", "".join(node.attributes.get("d", "") for node in root.all("path")))
    assert "nan" in {row[2] for row in rows(section(root, "Result").all("table")[1]) if row[0] == "static"}


ODD: st.SearchStrategy[Json] = st.sampled_from([None, "nan", "-inf", "text", True, -1, 0, 1e300, [], [None], {}, {"a": [1]}])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_log_of_odd_values_still_gives_a_page(played: Play, data: st.DataObject) -> None:
    records = copy.deepcopy(list(_short_records(played)))
    for _ in range(data.draw(st.integers(1, 12))):
        record = data.draw(st.sampled_from(records))
        name = data.draw(st.sampled_from(sorted(set(record) - {"event"})))
        record[name] = data.draw(ODD)
    assert parsed(page(view_of(ReadResult(records=tuple(records), malformed_count=0), name="run"))).all("h1")


_RECORDS: dict[str, tuple[dict[str, Json], ...]] = {}


def _short_records(played: Play) -> tuple[dict[str, Json], ...]:
    if "short" not in _RECORDS:
        _RECORDS["short"] = read_records(played(repeats=1, ticks=14) / "events.jsonl").records
    return _RECORDS["short"]


# Files beside the log


def test_the_config_file_is_shown_before_the_config_in_the_log(played: Play) -> None:
    directory = played()
    logged = section(report_of(directory), "Configuration").all("pre")
    assert [node.text for node in logged] == [
        'task: "digits"\nseed: 7\ngovernor:\n  check_every: 8', 'torch: "2.13.0"',
    ]  # fmt: skip
    (directory / "config.yaml").write_text("task: digits  # as written")
    (directory / "summary.json").write_text('{"accuracy": 0.9}')
    shown = section(report_of(directory), "Configuration").all("pre")
    assert [node.text for node in shown] == ["task: digits  # as written", 'torch: "2.13.0"', '{"accuracy": 0.9}']
