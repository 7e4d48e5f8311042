"""The comparison page of runs that differ in more than their policy, and its numbers in a browser and on paper."""

import itertools
import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, PAPER, PRINTED, visit
from report_runs import Page
from stored_trials import values, write_ablation, write_run

from envs.errors import InputError
from rlhf_duplex.report import side_by_side
from rlhf_duplex.report.comparable import mixed_rewards
from rlhf_duplex.report.comparison import build_comparison
from rlhf_duplex.report.runs import Comparison, Run, read_ablation, read_runs
from rlhf_duplex.report.side_by_side import ALL_PAIRS_RUNS, chosen_pairs, untested
from rlhf_duplex.report.side_by_side import script_data as script_data_of


def rewritten(folder, change):
    """The results of a run, changed in place."""
    path = folder / "evaluation" / "after.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def page_text(page):
    return " ".join("".join(Page(page).text).split())


def script_data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_rewards_scored_with_other_options_are_not_held_against_each_other(tmp_path):
    # The same episodes, scored twice: the rewards differ by their options alone.
    folders = []
    for condition, rate, value in (("slow", 1.0, -0.9), ("fast", 2.0, -0.2), ("again", 1.0, -0.9)):
        folders.append(tmp_path / condition)
        config = f"seed: 0\ntrainer: {{clip: {len(folders)}}}\nrewards: {{speech_rate: {{rate: {rate}}}}}\n"
        write_run(folders[-1], values(0.25, 1.0, 0), values(0.75, 1.5, 9), config, episodes=False)

        def score(result, rate=rate, value=value):
            result["rewards"] = {"speech_rate": {"target": None, "rate": rate}, "pause_handling": {"target": None}}
            result["segments"]["speech_rate"]["reward"] = {f"t{i}": value + i / 100 for i in range(8)}
            result["axes"]["speech_rate"]["reward"]["mean"] = value + 0.035

        rewritten(folders[-1], score)
    comparison = read_runs(folders)
    page = build_comparison(comparison, tmp_path / "page.html").read_text()
    text = page_text(page)
    assert "Not all runs scored the reward of speech_rate with the same options" in text
    assert page.count("scored with other options") == 1  # "again" was scored as the baseline was
    assert "No condition differs clearly" in text
    assert [row["title"] for row in script_data(page)] == ["Pause handling: takeover rate", "Turn-taking: latency"]
    assert page.count("<figcaption>speech_rate: reward") == 0
    assert "Dominated on all metrics" in text
    assert "<td>fast" not in page.split("Dominated in this trade-off by")[1].split("</table>")[0]


def test_a_run_without_an_axis_leaves_the_others_comparable(tmp_path):
    folders = []
    for number, condition in enumerate(("one", "two", "without")):
        folders.append(tmp_path / condition)
        config = f"seed: 0\ntrainer: {{clip: 0.{number + 1}}}\n"
        write_run(folders[-1], values(0.25, 1.0, 0), values(0.75, 1.5, 9), config, episodes=False)

        def score(result, lacks=condition == "without"):
            result["rewards"] = {"pause_handling": {"target": None}}
            if lacks:
                del result["axes"]["speech_rate"], result["segments"]["speech_rate"]
            else:
                result["rewards"]["speech_rate"] = {"target": None, "rate": 1.0}

        rewritten(folders[-1], score)
    for order in (folders, folders[::-1]):
        page = build_comparison(read_runs(order), tmp_path / "page.html").read_text()
        assert "Not all runs scored" not in page
        assert "scored with other options" not in page
        assert "speech_rate: reward" in [row["title"] for row in script_data(page)]
        assert page.count("<figcaption>speech_rate: reward") > 0


@pytest.mark.parametrize("order", list(itertools.permutations((None, {"rate": 1}, {"rate": 2}))))
def test_which_rewards_are_mixed_does_not_depend_on_the_order_of_runs(order):
    def run(name, options):
        result = {"axes": {"turn_taking": {"reward": {"mean": 0.0}}}}
        result |= {} if options is None else {"rewards": {"turn_taking": options}}  # of a version that kept none
        return Run(name, name, 0, None, after=result)

    runs = tuple(run(f"r{place}", options) for place, options in enumerate(order))
    assert mixed_rewards(Comparison("t", runs, {r.name: {} for r in runs}, "r0")) == {"turn_taking"}
    alike = tuple(r for r, options in zip(runs, order, strict=True) if options != {"rate": 2})
    assert mixed_rewards(Comparison("t", alike, {r.name: {} for r in alike}, alike[0].name)) == set()


def test_runs_on_different_segments_are_held_against_each_other_on_those_they_share(tmp_path):
    folders = [tmp_path / "all", tmp_path / "fewer"]
    for number, folder in enumerate(folders):
        config = f"seed: 0\ntrainer: {{clip: 0.{number + 1}}}\n"
        write_run(folder, values(0.25, 1.0, 0), values(0.25, 1.0, 0), config, episodes=False)

    def drop(result):  # p0, which was taken over, and t7; of 8 segments each
        for metrics in result["segments"].values():
            for column in metrics.values():
                column.pop("p0", None)
                column.pop("t7", None)
        result["axes"]["pause_handling"]["takeover_rate"]["mean"] = 1 / 7
        result["axes"]["turn_taking"]["latency"]["mean"] = 1.3
        result["lead_in_seconds"] = 0.5

    rewritten(folders[1], drop)
    page = build_comparison(read_runs(folders), tmp_path / "page.html").read_text()
    text = page_text(page)
    assert "different held-out segments (14 to 16 each): every figure here is over the 14" in text
    assert "different lead-ins" in text
    assert "Lead-in before each segment0.5 and 3 s of silence" in text
    assert "Held-out segments14" in text
    takeovers, latency, _ = script_data(page)
    assert takeovers["means"] == ["14 %", "14 %", "14 %"]  # 1 of 7, before training too
    assert latency["means"][0] == latency["means"][1]
    assert "none" in page.split("Dominated in this trade-off by")[1]
    assert ">all</td>" not in page
    alone = {"pause_handling": {"takeover_rate": {f"q{i}": 1.0 for i in range(8)}}}
    rewritten(folders[1], lambda result: result.update(segments=alone))
    with pytest.raises(InputError, match="share no held-out segment"):
        build_comparison(read_runs(folders), tmp_path / "page.html")


SIDE_BY_SIDE = """(() => {
  const cells = (row) => [...row.cells].map((cell) => cell.innerText);
  const rows = () => [...document.querySelectorAll("#difference tbody tr")].map(cells);
  const selects = ["run-of-Left", "run-of-Right"].map((id) => document.getElementById(id));
  const choose = (left, right) => {
    selects[0].value = left;
    selects[1].value = right;
    selects[0].dispatchEvent(new Event("change"));
    return rows();
  };
  return { forth: choose(0, 1), back: choose(1, 0), same: choose(1, 1) };
})()"""


def test_two_runs_differ_as_in_the_table_of_effects(tmp_path):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    # Values whose two roundings differ (12.5 %, 0.5449 s), and differences of p = 0.078: their mean is 2.06 standard
    # errors from 0, more than 1.96 and less than Student's 2.36 for 8 segments.
    taken = {"one": 1, "two": 3}
    for number, name in enumerate(taken):
        config = f"seed: 0\ntrainer: {{clip: 0.{number + 1}}}\n"
        write_run(tmp_path / name, values(0.25, 1.0, 0), values(0.75, 1.5, 9), config, episodes=False)

        def change(result, moved=number, share=taken[name]):
            takeovers = {f"p{i}": float(i < share) for i in range(8)}
            spread = [-3.0, -1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.0]
            latencies = {f"t{i}": 0.5449 + moved * (0.1 * x + 0.088) for i, x in enumerate(spread)}
            result["segments"]["pause_handling"]["takeover_rate"] = takeovers
            result["axes"]["pause_handling"]["takeover_rate"]["mean"] = share / 8
            result["segments"]["turn_taking"]["latency"] = latencies
            result["axes"]["turn_taking"]["latency"]["mean"] = sum(latencies.values()) / 8

        rewritten(tmp_path / name, change)
    path = tmp_path / "page.html"
    page = build_comparison(read_runs([tmp_path / "one", tmp_path / "two"]), path).read_text()
    seen = visit(path, SIDE_BY_SIDE)
    assert seen["errors"] == []
    forth, back, same = seen["value"]["forth"], seen["value"]["back"], seen["value"]["same"]
    above = page.split("Table of effects")[1].split("</table>")[0]
    for row in forth:
        _, left, _, difference, interval = row
        span, p, segments = interval.split(", ")
        for text in (left, difference, span, p, segments):
            assert text in above, (row, text)
    by_name = {row[0]: row for row in forth}
    assert by_name["Pause handling: takeover rate"][1:4] == ["12 %", "38 %", "+25 points"]
    assert by_name["Turn-taking: latency"][1] == "0.54 s"
    p = float(by_name["Turn-taking: latency"][4].split(", ")[1].removeprefix("p = "))
    assert p == 0.078
    assert by_name["Turn-taking: latency"][3][0] == "+"  # neither better nor worse
    turned = {row[0]: row for row in back}["Pause handling: takeover rate"]
    assert turned[1:4] == ["38 %", "12 %", "\u221225 points"]
    assert turned[4].startswith("\u221264 to +14 points")
    assert {row[3] for row in same} == {"the same run"}


def test_a_printed_page_has_all_columns(tmp_path):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    wide = write_ablation(tmp_path / "run", {name: ({}, 0.25, 0.5) for name in ("full", "a" * 40)}, seeds=(0, 1))
    plan = json.loads((wide / "ablation.json").read_text())
    names = ["pause_handling.takeover_rate", "turn_taking.latency", "speech_rate.reward", "pause_handling.reward"]
    (wide / "ablation.json").write_text(json.dumps(plan | {"metrics": names * 3}))
    path = build_comparison(read_ablation(wide), wide / "report.html")
    seen = visit(path, PRINTED, paper=PAPER)
    assert (seen["value"], seen["errors"]) == ([], [])


def test_conditions_without_a_common_seed_are_told(tmp_path):
    for seed, (name, latency) in enumerate({"one": 1.0, "two": 1.5}.items()):
        config = f"seed: {seed}\ntrainer: {{clip: 0.{seed + 1}}}\n"
        write_run(tmp_path / name, values(0.25, latency, seed), values(0.75, 1.5, 9), config, episodes=False)
    comparison = read_runs([tmp_path / "one", tmp_path / "two"])
    text = page_text(build_comparison(comparison, tmp_path / "page.html").read_text())
    assert text.count("no seed in common: their spread is not in p") == 3
    assert "1 of 1 seeds" not in text
    assert "and, where they have seeds in common, with the same seeds" in text


def many_runs(conditions, before=None):
    """A finished run of each condition, of one metric over six segments."""
    runs = []
    for number, condition in enumerate(conditions):
        column = {f"t{i}": 0.1 * i + 0.01 * number * (i % 3) for i in range(6)}
        after = {"axes": {"turn_taking": {"latency": {"mean": 0.3}}}, "segments": {"turn_taking": {"latency": column}}}
        runs.append(Run(f"r{number}", condition, number, Path("none"), after=after, before=before and after))
    return Comparison("t", tuple(runs), {condition: {} for condition in conditions}, "full")


def test_of_many_runs_each_is_held_against_the_baseline_alone():
    conditions = ["other", "full", "full", *(f"c{i}" for i in range(ALL_PAIRS_RUNS - 2))]
    (row,) = json.loads(script_data_of(many_runs(conditions, before=True), [("turn_taking", "latency")]))
    runs = len(conditions)
    pairs = {(int(i), int(j)) for i, found in row["pairs"].items() for j in found}
    assert pairs == {(i, j) for i in range(runs + 1) for j in range(i + 1, runs + 1) if {i, j} & {1, 2, runs}}
    assert untested(many_runs(conditions, before=True)) == "tested only against full or before training"
    assert untested(many_runs(conditions)) == "tested only against full"
    (row,) = json.loads(script_data_of(many_runs(conditions[:-1]), [("turn_taking", "latency")]))
    assert sum(map(len, row["pairs"].values())) == ALL_PAIRS_RUNS * (ALL_PAIRS_RUNS - 1) / 2
    assert untested(many_runs(conditions[:-1])) == ""


def test_what_is_tested_grows_with_the_runs_though_all_are_of_the_baseline():
    counts = [len(chosen_pairs(many_runs(["full"] * runs), runs)) for runs in (100, 200, 300)]
    assert counts[1] - counts[0] == counts[2] - counts[1]
    assert untested(many_runs(["full"] * 100)) == "tested only against full's first 10 runs"


def test_a_page_of_many_runs_says_which_two_are_tested(tmp_path, monkeypatch):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    monkeypatch.setattr(side_by_side, "ALL_PAIRS_RUNS", 2)
    path = build_comparison(many_runs(["full", "one", "two"]), tmp_path / "page.html")
    seen = visit(path, SIDE_BY_SIDE.replace("choose(1, 0)", "choose(2, 1)"))
    assert seen["errors"] == []
    assert seen["value"]["forth"][0][3].endswith(" s")
    assert seen["value"]["back"][0][3] == "tested only against full"
    assert seen["value"]["same"][0][3] == "the same run"
    assert "Of so many runs, each is tested only against full." in page_text(path.read_text())
