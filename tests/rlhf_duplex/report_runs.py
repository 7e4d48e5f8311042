"""What the tests of pages share: runs as training leaves them, with dialogues of tones, and a page read as text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from envs.episode import Episode
from envs.segments import Segment
from envs.speech import Interval
from rewards import Backchannel, PauseHandling, TurnTaking, UserInterruption
from rlhf_duplex.evaluation.metrics import segment_values, write_results
from rlhf_duplex.evaluation.suite import save_examples

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
VOID = {"meta", "br", "img", "hr", "input", "link"}


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
