"""The report, from a run folder made here of real episodes with hostile words in them."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
import soundfile
from browser import CHROMIUM, INSPECTION, PAPER, PRINTED, visit
from report_runs import (
    HOSTILE,
    LEAD_IN,
    Page,
    make_run,
)

from envs.errors import InputError
from rlhf_duplex.evaluation.metrics import change, read_results
from rlhf_duplex.report.build import build_report, median_segments
from rlhf_duplex.report.labels import interval, number


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = build_report(make_run(tmp_path_factory.mktemp("report") / "run"))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_times_are_in_one_chart_and_shares_of_time_in_another(page):
    _, _, rest = page.partition("Time of an update, seconds")
    times, _, busy = rest.partition("Busy during an update, share of its time")
    assert ">rollout<" in times
    assert ">total<" not in times
    assert "learner" not in times
    assert "learner" in busy


def test_page_is_whole_and_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    assert "http://" not in page
    assert "https://" not in page
    assert len(page) < 4_000_000
    for tag, attributes in parsed.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img"}
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = [i for _, a in parsed.tags for i in a.get("aria-labelledby", "").split()]
    assert set(referred) <= set(ids)


def test_hostile_text_is_text(page):
    parsed = Page(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1  # the page's own
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert any(HOSTILE in data for data in parsed.text)


def test_page_says_what_was_run_and_what_came_of_it(page):
    text = " ".join("".join(Page(page).text).split())
    for expected in ("GRPO", "30 of 30", "3.0 s of silence", "2 min 18 s", "24 segments, 1 episode of each"):
        assert expected in text
    # All four axes improve on all of their six segments, and none of them by chance.
    assert "Reward: improved on pause handling, turn-taking, backchannel, user interruption." in text
    # Turn-taking: the turn ends at 5.0 s, the agent starts at 6.9 s before and at 5.3 s after.
    assert "Turn-taking: reward \u22121.90 s (latency 1.90 s)." in text
    assert "latency 0.30 s" in text
    assert "takeover: agent speech of 1.7" in text
    assert "hits 1, false alarms 1, missed 1" in text
    assert "nearest to the median change in reward" in text


def test_tables_and_figures_are_labelled(page):
    parsed = Page(page)
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")
    drawings = [a for tag, a in parsed.tags if tag == "svg"]
    assert all({"aria-labelledby", "aria-label", "aria-hidden"} & set(a) for a in drawings)
    # Rewards, learning, groups that teach nothing, times and shares of them, and two distributions of latency.
    assert sum(a.get("class") == "chart" for a in drawings) == 5 + 6 + 3 + 2


def test_players_hold_the_dialogue(page):
    players = [a for tag, a in Page(page).tags if tag == "audio"]
    assert len(players) == 24  # the worst and two typical segments of each of four axes, before and after
    assert all("controls" in a and a["aria-label"] for a in players)
    data = base64.b64decode(players[0]["src"].partition("base64,")[2])
    audio, rate = soundfile.read(io.BytesIO(data))
    assert audio.shape[1] == 2
    assert len(audio) / rate == pytest.approx(LEAD_IN + 9.0, abs=0.1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("", "on the training segments: not the held-out"),
        ("context: {probability: 0.0, max_seconds: 5.0}\n", "on the training segments, without context: not"),
        ("context: {probability: 0.5, max_seconds: 5.0}\n", "with up to 5 s of context before some: not"),
        ("env: live\n", "on live dialogues with a user that reacts: not"),
    ],
)
def test_rewards_during_training_say_what_they_were_measured_on(tmp_path, more, told):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    config = (folder / "config.yaml").read_text().replace("context: {lead_in: 3.0}\n", "")
    (folder / "config.yaml").write_text(config + more)
    assert told in " ".join("".join(Page(build_report(folder).read_text()).text).split())


def test_report_of_a_run_that_is_not_finished(tmp_path):
    folder = make_run(tmp_path / "run", after=False)
    text = " ".join("".join(Page(build_report(folder).read_text()).text).split())
    assert "There is no evaluation after training yet" in text
    assert "There is no episode of this segment after training." in text
    assert "better" not in re.sub(r"(higher|lower) is better", "", text).replace("direction is better", "")


def test_report_of_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = "".join(Page(build_report(tmp_path).read_text()).text)
    assert "Nothing has been evaluated yet." in text
    assert "There is no update in metrics.jsonl yet." in text
    assert "No scored episodes are saved" in text


@pytest.mark.parametrize("broken", ["evaluation/before.json", "config.yaml", "episode"])
def test_damaged_files_are_named(tmp_path, broken):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=1)
    path = next(folder.glob("evaluation/before/*/episode.json")) if broken == "episode" else folder / broken
    path.write_text("{[")
    with pytest.raises(InputError) as caught:
        build_report(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        build_report(tmp_path / "none")
    with pytest.raises(InputError, match="is it a run folder"):
        build_report(tmp_path)


def test_figures_on_training_segments_are_marked(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=1)
    path = folder / "evaluation" / "before.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"on_training_segments": True, "lead_in_seconds": 0.0}))
    text = "".join(Page(build_report(folder).read_text()).text)
    assert "measured on the training segments" in text
    assert "different lead-ins" in text
    assert "too few segments to tell on pause handling" in text
    assert "a paired permutation test over these segments gives p below 0.05; of fewer than six it cannot" in text


def test_rewards_with_other_options_are_not_compared(tmp_path):
    folder = make_run(tmp_path / "run", updates=1)
    options = {"pause_handling": {}, "turn_taking": {}, "backchannel": {}, "user_interruption": {}}
    for stage, turn in (("before", {}), ("after", {"prompt_seconds": 0.4})):
        path = folder / "evaluation" / f"{stage}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rewards": options | {"turn_taking": turn}}))
    before, after = (read_results(folder / "evaluation" / f"{stage}.json") for stage in ("before", "after"))
    assert change(before, after, "turn_taking", "reward") is None
    assert change(before, after, "turn_taking", "latency") is not None
    assert change(before, after, "pause_handling", "reward") is not None
    text = "".join(Page(build_report(folder).read_text()).text)
    assert "scored the reward of turn-taking with other options" in text
    assert "not comparable on turn-taking" in text


def test_median_segments():
    rewards = {"a": 5.0, "b": -1.0, "c": 0.0, "d": 1.0, "e": 0.0}
    # In order: b -1, c 0, e 0, d 1, a 5; the middle is e.
    assert median_segments(rewards, 1) == ["e"]
    assert median_segments(rewards, 3) == ["c", "e", "d"]
    assert median_segments({"a": 1.0}, 2) == ["a"]


def test_numbers_are_written_with_their_units():
    assert number(0.417, "%") == "42 %"
    assert number(-1.234, "s", signed=True) == "\u22121.23 s"
    assert number(-0.001, "s", signed=True) == "0.00 s"
    assert number(0.0745, "/s") == "0.074/s"
    assert interval(-1.5, 0.25, "s", signed=True) == "\u22121.50 to +0.25 s"


def test_what_was_measured_during_training_and_the_distributions(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=2, updates=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1::2]:
        line["evaluation/turn_taking/reward"] = -1.0 / line["update"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(folder).read_text()
    text = " ".join("".join(Page(page).text).split())
    assert "Held-out segments during training" in text
    assert "Turn-taking, held-out, mean reward (s)" in text
    assert "Turn-taking: latency" in text
    assert "before (n 2)" in text
    # Two points of the curve: -1/2 after update 2 and -1/4 after 4.
    assert "from -0.5 at update 2 to -0.25 at 4" in text
    assert "first the worst of each axis" in text


def test_worst_episode_comes_first(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=4, updates=1)
    scores = folder / "evaluation" / "after"
    # The third of the backchannel segments is made the worst of its axis, by its score alone.
    (place,) = [p for p in scores.glob("*/scores.json") if p.parent.name.startswith("backchannel-2")]
    place.write_text(json.dumps({"backchannel": {"value": -9.0, "details": {}}}))
    page = build_report(folder).read_text()
    headings = re.findall(r'<h3 id="x\d+">(.*?)</h3>', page)
    assert len(headings) == 12
    assert [h.split(" <")[0] for h in headings[:4]] == [
        "Pause handling",
        "Turn-taking",
        "Backchannel",
        "User interruption",
    ]
    assert "backchannel-2" in headings[2]


def test_page_in_a_browser(page, tmp_path):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    seen = visit(path, INSPECTION)
    assert seen["errors"] == []
    assert seen["requests"] == []
    value = seen["value"]
    assert value["players"] == 24
    assert value["time"] > 0.2
    assert value["head"] == "visible"
    assert (value["scripts"], value["alerted"], value["images"]) == (1, False, 0)
    assert (value["headless"], value["unlabelled"], value["regions"]) == (0, 0, True)
    assert value["wide"] <= 0
    assert value["contrast"] >= 4.5
    assert HOSTILE in value["text"]


def test_a_printed_page_has_its_verdicts(page, tmp_path):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    seen = visit(path, PRINTED, paper=PAPER)
    assert (seen["value"], seen["errors"]) == ([], [])


def test_report_is_the_same_twice(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    first = build_report(folder).read_text()
    strip = re.compile(r"base64,[^\"]+")  # Ogg streams carry a random serial number
    assert strip.sub("", first) == strip.sub("", build_report(folder).read_text())


def test_a_reward_is_told_with_the_options_that_it_was_scored_with(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=5, updates=2)
    for stage in ("before", "after"):
        path = folder / "evaluation" / f"{stage}.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"rewards": {"turn_taking": {"target": None, "prompt_seconds": 0.4}}}))
    text = " ".join("".join(Page(build_report(folder).read_text(encoding="utf-8")).text).split())
    assert "minus the distance of the agent's turn from the user's turn end; with prompt_seconds 0.4;" in text
    assert re.search(r"Turn-taking: reward \S+ s \(latency 0\.3\d s; with prompt_seconds 0\.4\)", text)
    assert "(no takeover)" in text


def test_a_secret_of_the_environment_is_no_part_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    config = (folder / "config.yaml").read_text().replace("device: cpu", "device: ${oc.env:SOME_TOKEN}")
    (folder / "config.yaml").write_text(config)
    page = build_report(folder).read_text(encoding="utf-8")
    assert "hunter2" not in page
    assert "${oc.env:SOME_TOKEN}" in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "5\n"),
        ("metrics.jsonl", '{"kl": 1.0}\n'),
        ("evaluation/after.json", '{"axes": {"turn_taking": {"latency": 5}}}'),
        ("evaluation/after.json", '{"axes": {"turn_taking": [1]}}'),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, name, content):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=Path(name).name):
        build_report(folder)
