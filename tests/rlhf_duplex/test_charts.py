"""Curves and histograms as SVG."""

import json
import re

import pytest
from report_runs import make_run

from rlhf_duplex.report.build import build_report
from rlhf_duplex.report.charts import line_chart, nice_ticks, trailing_mean
from rlhf_duplex.report.distributions import latency_histogram


def test_chart_arithmetic():
    assert nice_ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert nice_ticks(-3.0, 9.0) == pytest.approx([0.0, 5.0])
    # Means of (2), (2, 4), (4, 9).
    assert trailing_mean([2, 4, 9], 2) == pytest.approx([2.0, 3.0, 6.5])


def test_every_curve_of_a_chart_looks_different():
    drawing = str(line_chart("t", {f"c{i}": ([0, 1], [i, i]) for i in range(36)}, "y", "c"))
    looks = re.findall(r'<polyline [^>]*stroke="(#\w+)"[^>]*stroke-dasharray="([^"]*)"', drawing)
    assert len(looks) == len(set(looks)) == 36


def test_latencies_below_a_second_have_a_scale():
    drawing = str(latency_histogram("t", {"a": [0.2, 0.4, 0.6]}, "h"))
    assert {"0.2", "0.4", "0.6"} <= set(re.findall(r'text-anchor="middle">([\d.]+)</text>', drawing))
    updates = str(line_chart("t", {"a": ([1, 2], [1, 2])}, "y", "c"))
    assert re.findall(r'class="tick"[^>]*text-anchor="middle">([\d.]+)</text>', updates) == ["1", "2"]


def test_what_workers_do_is_part_of_the_rollout(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    lines = [json.loads(line) | {"time/worker_model": 2.0} for line in (folder / "metrics.jsonl").open()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, _, rest = build_report(folder).read_text().partition("Time of an update, seconds")
    times, _, workers = rest.partition("Within the rollout, mean of the workers, seconds")
    assert "worker" not in times.partition("<figcaption>")[0]
    assert ">rollout<" in times
    assert "model: from 2 at update 1" in workers


def test_charts_bear_with_degenerate_curves():
    assert "No values yet" in line_chart("t", {"a": ([1], [float("nan")])}, "y", "c")
    for ys in ([1.0], [0.0, 0.0], [1e-300, 2e-300], [1e30, -1e30]):
        drawing = str(line_chart("t", {"a": (list(range(len(ys))), ys)}, "y", "c"))
        assert "nan" not in drawing
        assert "inf" not in drawing
