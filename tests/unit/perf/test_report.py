from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from perf.histogram import Histogram
from perf.parts import Part, Table
from perf.plots import Axis, bar_chart, line_chart
from perf.report import Report, Run, update_marked
from perf.targets import Target, judge
from perf.turns import Case, Results, Series, Turn


def series(per_second: float = 1000.0, cpu_s: float = 0.3, **fields) -> Series:
    latencies = Histogram()
    latencies.record(0.004)
    return Series([Turn(1000, per_second, {"proxy": cpu_s}, latencies, {}, 0.1, **fields)])


def part(title: str, what: str, **cases: Series) -> Part:
    named = {Case(*name.split("_at_")): taken for name, taken in cases.items()}
    return Part(title, "A note.", Table(("a", "b"), [("1", "2")]), [], {what: Results(named)})


def report() -> Report:
    made = Report("python -m perf <compare>", machine={"CPU": "a & b"})
    made.runs["requests"] = Run("python -m perf requests", [part("Requests", "requests", nginx=series())])
    made.runs["bulk"] = Run("python -m perf bulk", error="no nginx")
    made.targets = [Target("fast", 1.05, is_floor=False, value=1.2)]
    return made


def test_the_report_as_markdown_has_targets_tables_commands_and_what_failed():
    text = report().markdown()
    assert "| fast | at most 1.05 | 1.2 | **missed** |" in text
    assert "### Requests (requests)\n\nA note.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n" in text
    assert "`python -m perf bulk` failed: no nginx" in text


def test_the_html_escapes_and_needs_nothing_from_elsewhere():
    text = report().html()
    assert "&lt;compare&gt;" in text
    assert "a &amp; b" in text
    assert "<strong>missed</strong>" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_raw_data_has_every_turn(tmp_path):
    report().write(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    (turn,) = data["runs"]["requests"]["parts"][0]["turns"]["requests"]["nginx"]
    assert turn["per_second"] == 1000
    assert Histogram.from_json(turn["latencies"]).count == 1
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_warnings_name_failures_and_a_busy_client():
    shown = part("T", "requests", nginx=Series([Turn(1, 1, {}, Histogram(), {"reset": 2}, 0.99)]))
    assert "nginx failed at times: 2 x reset." in shown.warnings()
    assert "lower bounds: nginx." in shown.warnings()


def test_figures_go_between_the_markers(tmp_path):
    path = tmp_path / "P.md"
    path.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    update_marked(path, "new")
    assert path.read_text() == "before\n<!-- figures: begin -->\nnew\n<!-- figures: end -->\nafter\n"
    update_marked(path, "newer")
    assert "new\n" not in path.read_text()


def test_a_file_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "P.md"
    path.write_text("<!-- figures: end --> <!-- figures: begin -->")
    with pytest.raises(RuntimeError, match="figures: begin"):
        update_marked(path, "new")
    assert path.read_text() == "<!-- figures: end --> <!-- figures: begin -->"


def test_targets_are_ratios_of_what_was_measured():
    cases = {"nginx": series(cpu_s=0.02), "tlsproxy": series(cpu_s=0.06), "tlsproxy-tcp": series(cpu_s=0.03)}
    small, tcp = judge({"requests": [part("Requests", "requests", **cases)]})
    assert (small.value, small.met) == (pytest.approx(3.0), True)
    assert (tcp.value, tcp.met) == (pytest.approx(1.5), False)


def test_latency_independence_is_judged_against_the_rate_at_no_latency():
    rates = {0.0: 1000.0, 0.001: 950.0, 0.005: 900.0, 0.020: 500.0}
    results = Results()
    for latency_s, rate in rates.items():
        results[Case("tlsproxy-pkcs11", latency_s)] = series(rate)
        results[Case("nginx-pkcs11", latency_s)] = series(20.0)
        results[Case("stunnel-pkcs11", latency_s)] = series(700.0, cpu_s=1.0)
    shown = Part("P-256", "", Table((), ()), [], {"handshakes": results})
    met = {target.name: target.met for target in judge({"HSM latency": [shown]})}
    assert met["handshakes/s at 5 ms of HSM latency, of those at 0 ms"]
    assert not met["handshakes/s at 20 ms of HSM latency, of those at 0 ms"]
    assert not met["handshakes/s at 20 ms of HSM latency, x nginx + engine"]
    assert met["CPU per handshake at 20 ms of HSM latency, x stunnel + engine"]


def test_what_was_not_measured_is_not_judged():
    assert judge({}) == []
    assert not Target("t", 1.0, is_floor=True, value=float("nan")).met


def test_charts_are_well_formed_and_leave_out_what_has_no_place():
    x = Axis("latency & more, ms", logarithmic=True)
    chart = line_chart("<title>", x, Axis("%"), {"a<b": [(1, 10), (100, 90)], "zero": [(0, 1)], "none": []})
    drawn = ElementTree.fromstring(chart)
    assert len(drawn.findall("polyline")) == 1
    texts = [element.text for element in drawn.findall("text")]
    assert "a<b" in texts
    assert {"1", "10", "100"} <= set(texts)
    assert line_chart("t", x, Axis("%"), {"zero": [(0, 1)]}) == ""


def test_bars_are_drawn_to_scale():
    drawn = ElementTree.fromstring(bar_chart("t", "us", {"nginx": 100.0, "tlsproxy": 200.0, "gone": float("nan")}))
    widths = [float(element.get("width", "")) for element in drawn.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


@pytest.mark.parametrize(
    ("high", "ticks"), [(100, [0, 20, 40, 60, 80, 100]), (7, [0, 2, 4, 6]), (0.9, [0, 0.2, 0.4, 0.6, 0.8])]
)
def test_ticks_are_round_numbers(high, ticks):
    assert Axis("y").ticks(0, high) == pytest.approx(ticks)
