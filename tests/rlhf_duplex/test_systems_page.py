"""The page of `evaluate`, opened in a real browser: side by side, distributions, worst cases to hear."""

import io
import json
import shutil

import numpy as np
import pytest
from browser import CHROMIUM, INSPECTION, visit
from report_runs import AGENT, HOSTILE, Page, make_episode
from rich.console import Console

from rlhf_duplex.evaluation.cases import Case, load_cases, save_cases, worst_first
from rlhf_duplex.evaluation.comparison import as_table, compare
from rlhf_duplex.evaluation.distributions import backchannel_timing, position_shares
from rlhf_duplex.evaluation.metrics import write_results
from rlhf_duplex.report import systems
from rlhf_duplex.report.systems import build_systems_page


def system(folder, name, shift, seed=0):
    """A result whose latencies are `shift` longer, with cases of hostile words, as an evaluation writes it."""
    rng = np.random.default_rng(7)
    hard = rng.exponential(0.5, 20)
    noise = np.random.default_rng(seed).normal(0, 0.01, 20)
    latency = {f"s{i}": float(max(0.0, v + shift + e)) for i, (v, e) in enumerate(zip(hard, noise, strict=True))}
    values = {"turn_taking": {"latency": latency, "takeover_rate": dict.fromkeys(latency, 1.0)}}
    cases = []
    for axis in AGENT:
        for index in range(2):
            episode = make_episode(axis, AGENT[axis][0], index, text=HOSTILE, words=(HOSTILE,))
            cases.append(Case(axis, f"{axis} {HOSTILE}", float(index), f"why {HOSTILE}", episode))
    save_cases(folder / "cases" / name, worst_first(cases, 1))
    timing = {"agent": position_shares([0.1, 0.5]), "human": position_shares([0.5, 0.6])}
    extra = {"suite": "fdb-v1", "checkpoint": HOSTILE, "lead_in_seconds": 1.0, "timing": timing}
    extra["official"] = {"axes": {}}
    return write_results(folder / f"{name}.json", values, extra)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    shifts = (("base", 0.0), ("rl", -0.1))
    found = {name: system(folder, name, shift, seed) for seed, (name, shift) in enumerate(shifts)}
    return folder, found | {"same": system(folder, "same", 0.0)}


def test_a_page_without_room_for_all_cases_shows_the_worst_of_each_axis_and_system(results, monkeypatch, tmp_path):
    _, found = results
    folder = shutil.copytree(results[0], tmp_path / "copy")
    whole = systems._cases(folder, list(found))
    sizes = [len(case["audio"]) for case in whole]
    assert len(whole) == len(found) * len(AGENT)
    for name in found:  # a second case of each axis, beside the worst
        cases = load_cases(folder / "cases" / name)
        milder = [Case(c.axis, f"{c.name} 2", c.badness - 1, c.why, c.episode) for c in cases]
        save_cases(folder / "cases" / name, [*cases, *milder])
    assert len(systems._cases(folder, list(found))) == 2 * len(whole)
    monkeypatch.setattr(systems, "MAX_AUDIO_BYTES", sum(sizes) + min(sizes) // 2)
    shown = systems._cases(folder, list(found))
    assert [case["name"] for case in shown] == [case["name"] for case in whole]


def test_comparison_says_what_differs_and_what_not(results):
    _, found = results
    against = compare(found)
    assert against["rl", "turn_taking", "latency"].word == "better"
    assert against["same", "turn_taking", "latency"].word == "no change"
    assert against["same", "turn_taking", "latency"].p == 1.0
    assert against["rl", "turn_taking", "latency"].n == 20
    assert against["rl", "turn_taking", "latency"].corrected >= against["rl", "turn_taking", "latency"].p


def test_too_few_segments_have_no_p(tmp_path):
    values = {"turn_taking": {"latency": {f"s{i}": 1.0 + i / 10 for i in range(4)}}}
    moved = {"turn_taking": {"latency": {f"s{i}": 0.1 * i for i in range(4)}}}
    found = {
        name: write_results(tmp_path / f"{name}.json", column, {"suite": "live"})
        for name, column in (("base", values), ("rl", moved))
    }
    assert compare(found)["rl", "turn_taking", "latency"][2:] == (None, 4, "too few segments")
    text = " ".join("".join(Page(build_systems_page(tmp_path, found).read_text()).text).split())
    assert "too few segments (\u22121.00 s)" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_table(found))
    told = console.export_text()
    assert "too few segments" in told
    assert "too few segments, p" not in told


def test_page_is_whole_and_hostile_text_is_text(results):
    folder, found = results
    page = build_systems_page(folder, found).read_text()
    parsed = Page(page)
    assert "http://" not in page
    assert "https://" not in page
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")
    text = " ".join("".join(parsed.text).split())
    for expected in ("Side by side", "Leaderboard", "Distributions", "Worst cases", "base (lead-in 1 s)", "Holm"):
        assert expected in text


def test_page_in_a_browser(results, tmp_path):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    folder, found = results
    seen = visit(build_systems_page(folder, found), INSPECTION, tmp_path / "page.png")
    assert seen["errors"] == []
    assert seen["requests"] == []
    value = seen["value"]
    assert value["players"] == 12  # the worst of each of four axes, of each of three systems
    assert value["time"] > 0.2
    assert value["duration"] == pytest.approx(12.0, abs=0.1)
    assert value["head"] == "visible"
    assert value["moved"].startswith("translate(")
    assert (value["scripts"], value["alerted"], value["images"]) == (1, False, 0)
    assert (value["headless"], value["unlabelled"], value["regions"]) == (0, 0, True)
    assert value["wide"] <= 0
    assert value["contrast"] >= 4.5
    assert HOSTILE in value["text"]
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_cases_are_kept_worst_first(tmp_path):
    episodes = [make_episode("turn_taking", [(6.0, 8.0)], index) for index in range(3)]
    cases = [
        Case("a", f"n{i}", badness, "why", episode)
        for i, badness, episode in zip(range(3), (1.0, 3.0, 2.0), episodes, strict=True)
    ]
    save_cases(tmp_path / "cases", worst_first(cases, 2))
    loaded = load_cases(tmp_path / "cases")
    assert [(case.name, case.badness) for case in loaded] == [("n1", 3.0), ("n2", 2.0)]
    assert loaded[0].episode.agent_speech == episodes[1].agent_speech
    save_cases(tmp_path / "cases", [])
    assert load_cases(tmp_path / "cases") == []


def test_shares_of_positions_by_hand():
    shares = position_shares([0.0, 0.04, 0.5, 1.0])
    assert len(shares) == 20
    assert (shares[0], shares[10], shares[19]) == (0.5, 0.25, 0.25)
    assert position_shares([]) == []
    episode = make_episode("backchannel", [(3.2, 3.6)])
    timing = backchannel_timing([episode, make_episode("turn_taking", [(6.0, 8.0)])])
    # The middle of 3.2-3.6 s in a window of 9 s: 0.378, bin 7. Of people: 13.1-13.5 and 15.6-16.1 s less 10: 3.3, 5.85.
    assert timing["agent"].index(1.0) == 7
    assert [i for i, share in enumerate(timing["human"]) if share] == [7, 13]


def test_results_are_json_of_numbers(results):
    folder, _ = results
    record = json.loads((folder / "rl.json").read_text())
    assert record["axes"]["turn_taking"]["latency"]["n"] == 20
