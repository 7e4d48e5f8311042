"""The drawing of a dialogue, and its audio."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import soundfile
from report_runs import (
    make_episode,
)

from rewards import UserInterruption
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg


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


def test_marks_that_would_meet_are_written_once():
    episode = make_episode("backchannel", [(3.2, 3.6)])
    spans = [[3.0, 3.1], [3.2, 3.3], [9.0, 9.1]]
    drawing = str(timeline_svg(episode, {"backchannel": {"details": {"unmatched": spans}}}, 12.0, "t"))
    assert drawing.count(">false alarm</text>") == 2
    assert drawing.count("<title>false alarm, ") == 3
