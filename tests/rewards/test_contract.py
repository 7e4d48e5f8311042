"""The contract test: every way to break the contract is said in words; the built-in axes break none."""

import dataclasses
import re

import numpy as np
import pytest

from rewards import RewardAxis, Score, make_axis
from rewards.contract import check_contract
from rlhf_duplex.cli import main
from rlhf_duplex.rewards_command import _recorded_episodes


@pytest.fixture(scope="module")
def episodes():
    return _recorded_episodes(of_each=2)


def axis_that(score):
    class Tried(RewardAxis):
        """Tried."""

        name = "tried"

    Tried.score = score
    return Tried


STATE = {"calls": 0}


def counting(self, episodes):
    STATE["calls"] += 1
    return [Score(float(STATE["calls"])) for _ in episodes]


def changing(self, episodes):
    for episode in episodes:
        episode.segment.events["mine"] = 1.0
    return [Score(e.duration) for e in episodes]


def chance(self, episodes):
    return [Score(float(np.random.default_rng().random())) for _ in episodes]


BROKEN = [
    (lambda self, es: [e.duration for e in es], r"expected a Score or None, found float"),
    (lambda self, es: [Score(float("nan")) for e in es], r"the value nan is not finite"),
    (lambda self, es: [Score("1") for e in es], r"the value must be a number, found str"),
    (lambda self, es: [Score(1.0)], r"gave 1 scores for 8 episodes"),
    (lambda self, es: None, r"score must return a list, found NoneType"),
    (lambda self, es: [Score(es[0].no) for e in es], r"raises AttributeError: .*'no'.* \(test_contract.py, line \d+\)"),
    (chance, r"with the same episodes again, segment"),
    (lambda self, es: [Score(float(n)) for n, e in enumerate(es)], r"with the episodes in reverse order, segment"),
    (lambda self, es: [Score(e.duration - es[-1].duration) for e in es], r"may depend on nothing but the episode"),
    (lambda self, es: [Score(float(len(es)))] * len(es), r"with the episodes one by one, segment .* gets 1.0 where"),
    (counting, r"with the same episodes again"),
    (changing, r"changes the episode of segment"),
    (lambda self, es: [Score(e.duration, {"audio": e.user_audio}) for e in es], r"cannot be saved as JSON"),
    (
        lambda self, es: [Score(e.duration, {"turns": [{"rate": float("inf")}]}) for e in es],
        r"details of segment '.*' hold a number that is not finite, `turns\[0\].rate`",
    ),
    (lambda self, es: [None for e in es], r"scores none of the 8 episodes"),
    (lambda self, es: es[0] and [Score(e.duration) for e in es], r"with no episode at all: raises"),
    (lambda self, es: [Score(es[0].duration) for e in es], r"with the episodes in reverse order, segment"),
]


@pytest.mark.parametrize(("score", "message"), BROKEN)
def test_what_is_wrong_is_said_in_words(score, message, episodes):
    report = check_contract(axis_that(score), episodes)
    assert any(re.search(message, line) for line in report.wrong), report.wrong


def test_other_segments_than_it_says(episodes):
    cls = axis_that(lambda self, es: [Score(e.duration) for e in es])
    cls.applies_to = ("backchannel",)
    report = check_contract(cls, episodes)
    assert any("which is not in its applies_to" in line for line in report.wrong)
    cls.applies_to = ["backchannel"]
    assert any("it must be a tuple" in line for line in check_contract(cls, episodes).wrong)


def test_what_is_only_doubtful(episodes):
    report = check_contract(axis_that(lambda self, es: [Score(0.0) for e in es]), episodes)
    assert not report.wrong
    assert any("gives 0 to all 8 episodes" in line for line in report.doubtful)


def on_known_tokens(self, episodes):
    return [None if e.text_tokens is None else Score(1.0) for e in episodes]


def on_frames(self, episodes):
    return [Score(float(e.frame_mask(12.5).sum() / len(e.text_tokens))) for e in episodes]


@pytest.mark.parametrize(
    ("score", "message"),
    [(on_known_tokens, "scores none of the episodes: it"), (on_frames, "raises TypeError: .*: it reads tokens")],
)
def test_recorded_dialogues_have_no_tokens(score, message, episodes):
    report = check_contract(axis_that(score), episodes)
    assert not report.wrong
    assert re.search(message, report.doubtful[-1])
    assert report.doubtful[-1].endswith("recorded dialogues have none: give --episodes RUN/evaluation/after")
    spoken = [dataclasses.replace(e, text_tokens=np.arange(round(100 + e.duration))) for e in episodes]
    report = check_contract(axis_that(score), spoken)
    assert not report.wrong
    assert report.values


def test_the_command_line_says_what_it_could_not_check(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from rewards import RewardAxis, Score\n"
        "class Tokens(RewardAxis):\n"
        "    'Tokens.'\n"
        "    name = 'tokens'\n"
        "    def score_episode(self, episode): return Score(float(len(episode.text_tokens)))\n"
    )
    assert main(["rewards", "check", str(tmp_path / "mine.py")]) == 0
    out = capsys.readouterr().out
    assert "tokens: no score was seen, see above" in out
    assert "keeps the contract" not in out


@pytest.mark.parametrize(
    "name", ["pause_handling", "turn_taking", "backchannel", "user_interruption", "overlap", "repetition"]
)
def test_the_built_in_axes_keep_it(name, episodes):
    report = check_contract(lambda: make_axis(name), episodes)
    assert report.wrong == []
    assert len(report.passed) == 10
    assert report.seconds_per_episode < 0.05


def test_the_judged_axis_keeps_it(episodes, tmp_path):
    from experiments.judge.server import MODEL, JudgeServer

    with JudgeServer() as server:
        judge = {"base_url": server.base_url, "model": MODEL, "cache": str(tmp_path)}
        report = check_contract(lambda: make_axis("content", judge=judge), episodes)
        assert report.wrong == []
        assert server.calls == len(report.values) == 4  # turn-taking and interruption; the rest is the cache


def test_the_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from rewards import RewardAxis, Score\n"
        "class Good(RewardAxis):\n"
        "    'Longer is better.'\n"
        "    name = 'good'\n"
        "    def __init__(self, factor=1.0): self.factor = factor\n"
        "    def score_episode(self, episode): return Score(self.factor * episode.duration)\n"
        "class Bad(Good):\n"
        "    name = 'bad'\n"
        "    def score_episode(self, episode): return episode.duration\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["rewards", "check", "mine.py"]) == 2
    got = capsys.readouterr()
    assert "expected a Score or None, found float" in got.out
    assert got.err.strip() == "rlhf-duplex: bad: does not keep the contract of a reward axis, see above"
    assert main(["rewards", "check", "mine:Good", "factor=2"]) == 0
    assert "good: keeps the contract" in capsys.readouterr().out
    for arguments, message in [
        (["check"], "rewards check needs an axis"),
        (["check", "nowhere.py"], "file nowhere.py does not exist"),
        (["check", "overlap", "free=1"], "reward axis 'overlap': .*free"),
        (["check", "overlap", "free"], "argument 'free' is not of the form key=value"),
        (["check", "overlap", "--episodes", "."], "holds no saved episode"),
        (["humour"], "unknown reward axis 'humour'"),
    ]:
        assert main(["rewards", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert main(["rewards"]) == 0
    listed = capsys.readouterr().out
    assert "free_seconds=1.0" in listed
    assert "user_interruption" in listed
    assert main(["rewards", "overlap"]) == 0
    assert "so that a backchannel is allowed" in capsys.readouterr().out
