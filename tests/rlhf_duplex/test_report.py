"""The report, from a run folder made here of real episodes with hostile words in them."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, INSPECTION, PAPER, PRINTED, visit

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import Interval
from rewards import Backchannel, PauseHandling, TurnTaking, UserInterruption
from rlhf_duplex.evaluation.metrics import change, read_results, segment_values, write_results
from rlhf_duplex.evaluation.suite import save_examples
from rlhf_duplex.report.build import build_report, median_segments
from rlhf_duplex.report.charts import line_chart, nice_ticks, trailing_mean
from rlhf_duplex.report.distributions import latency_histogram
from rlhf_duplex.report.labels import interval, number
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg

RATE = 8000
LEAD_IN = 3.0
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
USER = {  # user speech by axis, in seconds of the segment
    "pause_handling": [(0.3, 1.9), (2.5, 4.2), (4.9, 6.6)],
    "turn_taking": [(0.1, 2.6), (2.9, 5.0)],
    "backchannel": [(0.2, 3.1), (3.4, 7.5)],
    "user_interruption": [(0.0, 2.2), (4.6, 6.0)],
}
EVENTS = {
    "pause_handling": {"pauses": [[11.9, 12.5], [14.2, 14.9]]},
    "turn_taking": {"user_turn_end": 15.0},
    "backchannel": {"true_backchannels": [[13.1, 13.5], [15.6, 16.1]]},
    "user_interruption": {"interruption": [14.6, 16.0]},
}
AGENT = {  # agent speech by axis before and after, in seconds of the segment
    "pause_handling": ([(2.0, 3.7)], [(2.0, 2.5)]),
    "turn_taking": ([(6.9, 8.9)], [(5.3, 8.8)]),
    "backchannel": ([(1.0, 2.9)], [(3.2, 3.6), (6.9, 7.2)]),
    "user_interruption": ([(2.6, 6.3), (8.0, 8.9)], [(2.6, 5.0), (6.4, 8.8)]),
}
AXES = [PauseHandling(), TurnTaking(), Backchannel(), UserInterruption()]


def tone(speech, seconds, pitch):
    times = np.arange(round(seconds * RATE)) / RATE
    loud = np.zeros_like(times)
    for start, end in speech:
        loud[(times >= start) & (times < end)] = 0.2
    return (loud * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def make_episode(axis, agent, index=0, shift=0.0, text="yes I think so", words=("hello", "there")):
    segment = Segment(
        f"{axis}-{index} {HOSTILE}",
        axis,
        Path("/nowhere/dialogue.flac"),
        1,
        10.0,
        19.0,
        EVENTS[axis],
        tuple((word, (10.5 + n, 10.9 + n), "user") for n, word in enumerate(words)),
    )
    seconds = LEAD_IN + 9.0
    user = [Interval(s + LEAD_IN, e + LEAD_IN) for s, e in USER[axis]]
    spoken = [Interval(s + LEAD_IN, min(e + LEAD_IN + shift, seconds)) for s, e in agent]
    audio = tone(user, seconds, 180), tone(spoken, seconds, 310)
    return Episode(segment, *audio, RATE, user, spoken, seconds, LEAD_IN, text, policy_version=3)


def score(episodes):
    columns = {axis.name: axis.score(episodes) for axis in AXES}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(episodes))]


def make_run(folder, segments_per_axis=6, updates=30, after=True):
    """A run folder as the trainer writes it: 3 s lead-in, four axes, better timing after than before."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "checkpoint: nano\nseed: 7\ndevice: cpu\nsegments: nano\ntrainer: {algorithm: grpo, updates: 30, groups: 8, "
        "group_size: 8}\noptimiser: {learning_rate: 1.0e-4}\ncontext: {lead_in: 3.0}\n"
    )
    rng = np.random.default_rng(0)
    lines = []
    for update in range(1, updates + 1):
        line = {"update": update, "kl": 0.002 * update, "entropy": 0.9 - 0.01 * update, "loss": rng.normal(0, 0.01)}
        line |= {"ratio_max": 1.1, "clip_fraction": 0.01, "grad_norm": 0.5, "reward/total": -3 + 0.05 * update}
        for axis in AGENT:
            line |= {f"reward/{axis}": -1 + 0.02 * update + rng.normal(0, 0.1), f"frac_zero_std/{axis}": rng.random()}
        line |= {"time/rollout": 3.0, "time/score": 0.2, "time/update": 1.4, "time/total": 4.6}
        line |= {"time/utilisation_learner": 0.3}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    for which, stage in enumerate(("before", "after")[: 1 + after]):
        episodes = [
            make_episode(axis, AGENT[axis][which], index, shift=0.02 * index, text=HOSTILE, words=(HOSTILE, "ok"))
            for axis in AGENT
            for index in range(segments_per_axis)
        ]
        extra = {"checkpoint": "nano", "lead_in_seconds": LEAD_IN, "samples": 1, "on_training_segments": False}
        scores = score(episodes)
        write_results(folder / "evaluation" / f"{stage}.json", segment_values(episodes, scores), extra)
        save_examples(folder / "evaluation" / stage, episodes, scores, segments_per_axis)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = build_report(make_run(tmp_path_factory.mktemp("report") / "run"))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text.append(data)


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


def test_audio_has_user_left_and_agent_right():
    episode = make_episode("turn_taking", [(6.0, 8.0)])
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(audio_uri(episode).partition("base64,")[2])))
    user, agent = (audio[int(a * rate) : int(b * rate)] for a, b in ((4.0, 5.0), (9.5, 10.5)))
    user_left, user_right = np.sqrt((user**2).mean(axis=0))
    agent_left, agent_right = np.sqrt((agent**2).mean(axis=0))
    assert user_left > 2 * user_right > 0
    assert agent_right > 2 * agent_left > 0


def test_timeline_has_a_block_an_interval_and_a_mark_an_event():
    episode = make_episode("pause_handling", [(0.0, 0.4), (2.0, 3.7)])
    scores = {"pause_handling": {"value": -1.0, "details": {"takeovers": [[5.0, 6.7]]}}}
    drawing = str(timeline_svg(episode, scores, 12.0, "t"))
    assert drawing.count('class="speech user"') == len(episode.user_speech) == 3
    assert drawing.count('class="speech agent"') == len(episode.agent_speech) == 2
    assert drawing.count('class="pause"') == 2
    assert drawing.count(">takeover<") == 1
    # 12 s are drawn over 560 - 48 - 10 = 502 units from 48 on: the agent's 5.0 s lies at 48 + 5 * 502 / 12 = 257.2.
    assert re.search(r'class="speech agent" x="257\.2"', drawing)


def test_events_beyond_the_end_of_an_episode_are_left_out():
    shorter = replace(make_episode("pause_handling", [(0.0, 0.4)]), duration=6.0)  # its pauses: 4.9 s, 7.2 s
    assert str(timeline_svg(shorter, {}, 12.0, "t")).count('class="pause"') == 1
    # A pause that goes on is drawn to the end: 5.2 s lies at 48 + 5.2 * 502 / 12 = 265.5, after 12.6 units from 4.9 s.
    cut = replace(shorter, duration=5.2)
    assert re.search(r'class="pause" x="253\.0" y="26" width="12\.[56]"', str(timeline_svg(cut, {}, 12.0, "t")))
    turn = make_episode("turn_taking", [])  # which ends at 8.0 s
    assert "turn ends 8.00 s" in str(timeline_svg(turn, {}, 12.0, "t"))
    assert "turn ends" not in str(timeline_svg(replace(turn, duration=7.0), {}, 12.0, "t"))
    barge = replace(make_episode("user_interruption", []), duration=7.0)  # interrupted from 7.6 s on
    assert "interruption 7" not in str(timeline_svg(barge, {}, 12.0, "t"))


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


def test_timeline_bears_with_any_details():
    """An axis of the user's own may put anything into its details."""
    episode = make_episode("turn_taking", [(6.0, 8.0)])
    odd = {"takeovers": "x", "matched": [[1]], "latency": float("nan"), "response": {"a": 1}}
    drawing = str(timeline_svg(episode, {"turn_taking": {"value": "high", "details": odd}}, 12.0, "t"))
    assert drawing.count('class="mark"') == 0
    assert "Not scored." in drawing


def told(agent, **options):
    """Of an interruption until 9.0 s in an episode of 12: the labels of the drawing's marks, and the words."""
    episode = make_episode("user_interruption", agent)
    (scored,) = UserInterruption(**options).score([episode])
    scores = {"user_interruption": {"value": scored.value, "details": scored.details}}
    drawing = str(timeline_svg(episode, scores, 12.0, "t"))
    marks = re.findall(r'<path class="mark" d="([^"]*)"><title>([^<]*)', drawing)
    return [title for _, title in marks], outcome(episode, scores)[0]


def test_what_was_scored_of_an_interruption_is_what_is_drawn():
    short, long = (8.37, 8.9), (7.2, 8.9)  # after 2.37 s for 0.53 s; after 1.2 s for 1.7 s
    assert told([short]) == (["2.37 s, 9.00 to 11.37 s"], "User interruption: reward \u22122.37 s (latency 2.37 s).")
    # Only speech of more than a second was an answer: the whole rest of the episode was charged.
    marks, words = told([short], answer_seconds=1.0)
    assert marks == ["no answer, 9.00 to 12.00 s"]
    assert "reward \u22123.00 s (no answer longer than 1 s; first speech after 2.37 s" in words
    marks, words = told([(6.3, 6.8), long], answer_seconds=1.0)
    assert marks == ["1.20 s, 9.00 to 10.20 s"]
    assert "(latency 1.20 s; first speech after 0.30 s" in words
    assert told([long], answer_seconds=1.0) == told([long])
    assert told([])[0] == ["no answer, 9.00 to 12.00 s"]
    # Scores of before say nothing of the answer that was rewarded.
    scores = {"user_interruption": {"value": -1.2, "details": {"latency": 1.2, "response": [10.2, 11.9]}}}
    drawing = str(timeline_svg(make_episode("user_interruption", [long]), scores, 12.0, "t"))
    assert "<title>1.20 s, 9.00 to 10.20 s" in drawing


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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_printed_page_has_its_verdicts(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    seen = visit(path, PRINTED, paper=PAPER)
    assert (seen["value"], seen["errors"]) == ([], [])


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


def test_report_is_the_same_twice(tmp_path):
    folder = make_run(tmp_path / "run", segments_per_axis=1, updates=2)
    first = build_report(folder).read_text()
    strip = re.compile(r"base64,[^\"]+")  # Ogg streams carry a random serial number
    assert strip.sub("", first) == strip.sub("", build_report(folder).read_text())


def test_long_words_are_whole_beside_the_timeline():
    from rlhf_duplex.report.timeline import words_are_cut

    episode = replace(make_episode("turn_taking", [(6.0, 8.0)]), text="word " * 80)
    drawing = str(timeline_svg(episode, {}, 12.0, "t"))
    assert "…" in drawing
    assert words_are_cut(episode.text)
    assert not words_are_cut("short")
    # Two lines of small letters fill the width; capitals are wider, and ideographs twice as wide.
    assert not words_are_cut("word " * 32)
    assert words_are_cut("WORD " * 32)
    assert words_are_cut("\u8a00\u8449 " * 40)


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


def test_marks_that_would_meet_are_written_once():
    episode = make_episode("backchannel", [(3.2, 3.6)])
    spans = [[3.0, 3.1], [3.2, 3.3], [9.0, 9.1]]
    drawing = str(timeline_svg(episode, {"backchannel": {"details": {"unmatched": spans}}}, 12.0, "t"))
    assert drawing.count(">false alarm</text>") == 2
    assert drawing.count("<title>false alarm, ") == 3
