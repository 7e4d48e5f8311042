"""The judged axes: turns worked out by hand, scores by a real server, and what is unknown left out."""

import math

import pytest
from judging import faulty_server, verdict_json

from envs import InputError, Word
from experiments.judge.server import MODEL, JudgeServer
from rewards import EarlyScores, RewardFunction, RewardSpec, checked_scores, make_axis
from rewards.content import alternating_turns
from rewards.transcripts import CorpusWords, InnerMonologue

REPLY = "That sounds like a good plan to me."


def words(text, start, step=0.3):
    return tuple(Word(word, start + n * step, start + (n + 1) * step) for n, word in enumerate(text.split()))


@pytest.fixture
def talk(episode):
    """A function that gives an episode of 20 s in which the user asks from 3 s on and the agent answers at 7 s."""

    def make(answer, axis="turn_taking", asked="I have a dog what do you think", transcript=True, at=7.0):
        from dataclasses import replace

        one = episode(axis, agent=[(7.0, 9.0)], user=[(3.0, 5.4)], user_turn_end=5.4)
        lines = tuple((w.text, [w.start + 98, w.end + 98], "user") for w in words(asked, 3.0)) if transcript else ()
        return replace(
            one, segment=replace(one.segment, transcript=lines), text=answer, words=words(answer, at) if answer else ()
        )

    return make


def content(server, tmp_path, **options):
    url = server if isinstance(server, str) else server.base_url
    judge = {"base_url": url, "model": MODEL, "cache": str(tmp_path / "cache"), "backoff": 0.01, "retries": 1}
    return make_axis("content", judge=judge | options.pop("judge", {}), **options)


def test_turns_alternate_and_a_backchannel_tears_nothing_apart():
    user = [*words("I was in the mountains", 1.0), *words("and it rained", 3.0), *words("so what now", 9.0)]
    agent = [Word("mm-hm", 1.8, 2.1), *words("oh no", 5.0), *words("go again", 5.9), *words("take a coat", 10.2)]
    # The user's words have gaps of 0.5 s (one utterance) and 5 s; the agent's "mm-hm" begins within the first.
    assert [(turn.role, turn.text) for turn in alternating_turns(user, agent)] == [
        ("USER", "I was in the mountains and it rained"),
        ("MODEL", "mm-hm oh no go again"),
        ("USER", "so what now"),
        ("MODEL", "take a coat"),
    ]
    assert alternating_turns([], []) == []
    assert [t.role for t in alternating_turns(words("hi", 1.0), words("hi", 1.0))] == ["USER", "MODEL"]


def test_scores_reasons_silence_and_what_does_not_apply(talk, tmp_path):
    episodes = [
        talk(REPLY),
        talk("The best time is early in the morning."),
        talk("small bank plan"),
        talk(""),
        talk(REPLY, axis="pause_handling"),
        talk(REPLY, transcript=False),
    ]
    with JudgeServer() as server:
        axis = content(server, tmp_path)
        scores = checked_scores(axis, episodes)
        assert [s and s.value for s in scores] == [2.0, 1.0, 0.0, 0.0, None, None]
        assert scores[0].details["turns"] == [["USER", "I have a dog what do you think"], ["MODEL", REPLY]]
        assert "suits a request for opinion" in scores[0].details["reason"]
        assert scores[3].details == {"reason": "the agent said nothing"}
        figures = axis.metrics()
        assert {k: figures[k] for k in ("judged", "cached", "failed", "calls")} == {
            "judged": 3,
            "cached": 0,
            "failed": 1,  # nobody knows what that user said
            "calls": 3,
        }
        assert figures["latency"][0] > 0
        assert figures["latency"][1] == 3
        assert checked_scores(axis, episodes) == scores
        assert axis.metrics()["cached"] == 3
        nothing = axis.metrics()
        assert nothing.pop("latency") == (0, 0)
        assert sum(nothing.values()) == 0
        everywhere = content(server, tmp_path, axes=["pause_handling"])
        assert checked_scores(everywhere, episodes)[4].value == 2.0


def test_what_cannot_be_judged_is_left_out_and_said(talk, tmp_path, caplog):
    with faulty_server(lambda number, _: None if number == 1 else (500, {})) as server:
        axis = content(server, tmp_path, judge={"concurrency": 1})
        scores = axis.score([talk(REPLY), talk(REPLY, asked="hello"), talk(REPLY, asked="you there")])
    assert [s and s.value for s in scores] == [2.0, None, None]
    assert "content: 2 of 3 episodes could not be judged and are left out (the judge: status 500" in caplog.text
    assert axis.metrics()["failed"] == 2
    left = axis.left_out()
    assert (left.count, left.total, left.many) == (2, 3, True)
    assert "status 500" in left.reasons[0]
    assert axis.left_out() is None


def test_one_unjudged_member_stays_out_of_its_groups_standardisation():
    import torch

    from rlhf_duplex.algorithms.advantages import combine_advantages

    nan = math.nan
    rewards = {"content": torch.tensor([[2.0, 0.0, nan, nan], [nan] * 4, [1.0, 1.0, 1.0, nan]])}
    result = combine_advantages(rewards, {"content": 1.0})
    # (2 - 1) / 1 and (0 - 1) / 1; had the missing ones counted as 0 it would be 1.73 and -0.58.
    assert result.advantages[0].tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=1e-3)
    assert not result.advantages[1:].any()
    assert result.mean["content"] == pytest.approx(1.0)
    assert result.frac_zero_std["content"] == 0.5


def test_batches_are_judged_while_the_next_ones_play(talk, tmp_path):
    import time

    with JudgeServer(latency=0.3) as server:
        axis = content(server, tmp_path)
        axis.prepare([talk(REPLY).segment])  # imports the client
        function = RewardFunction({"turn_taking": RewardSpec()})
        function.axes["content"], function.weights["content"] = axis, 1.0
        early = EarlyScores(function)
        started = time.monotonic()
        for batch in range(4):
            early.add([batch], [talk(REPLY, asked=f"{batch} what do you think")])
            time.sleep(0.2)  # the next batch plays
        played = time.monotonic() - started
        scores = early.finish()
        waited = time.monotonic() - started - played
    assert [row["content"].value for row in scores] == [2.0] * 4
    assert [row["turn_taking"].value for row in scores] == pytest.approx([-1.6] * 4)
    # One after another it would be 4 x 0.3 s of waiting; here all but the end of the last went by while playing.
    assert waited < 0.3


def test_other_instances_of_the_same_contract(talk, tmp_path):
    with faulty_server(lambda *_: verdict_json(1, "careless")) as server:
        judge = {"base_url": server.base_url, "model": MODEL, "cache": None}
        axis = make_axis("safety", judge=judge)
        scores = checked_scores(axis, [talk(REPLY, axis="backchannel"), talk("")])
    assert scores[0].value == 1.0
    assert scores[1] is None  # silence is not a way to be safe


def test_the_users_words_within_what_was_played(talk):
    from dataclasses import replace

    one = talk(REPLY)
    lines = (
        ("earlier", [98.2, 98.6], "user"),  # 0.2 s of the episode: lead-in, nothing was heard there
        ("context", [99.2, 99.8], "user"),  # 1.2 s: in the context
        ("late", [130.0, 130.2], "user"),
        ("agent", [103.0, 103.2], "agent"),
        ("here", [101.0, 101.4], "user"),
    )
    heard = replace(one, segment=replace(one.segment, transcript=lines), user_speech=[(1.1, 1.9), (3.0, 3.5)])
    from envs import Interval

    heard = replace(heard, user_speech=[Interval(*pair) for pair in heard.user_speech])
    [found] = CorpusWords().words([heard])
    assert [word.text for word in found] == ["context", "here"]
    assert found[1] == Word("here", 3.0, pytest.approx(3.4))
    [said] = InnerMonologue().words([replace(one, words=())])
    assert said == [Word(REPLY, 7.0, 20.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward axis 'content': a judge is needed"),
        ({"judge": {"base_url": "http://x/v1"}}, "a judge is needed"),
        ({"judge": {"base_url": "http://x/v1", "model": "m", "api_key": "sk-1"}}, "judge: unknown option `api_key`"),
        ({"judge": {"base_url": "x", "model": "m"}}, "reward axis 'content': judge: base_url must be"),
        ({"user": "asr"}, "`user: asr` needs a model"),
        ({"agent": "corpus"}, "`agent: corpus` is not known: choose inner_monologue or asr"),
        ({"user": "asr", "asr": {"model": "m", "beam": 1}}, "asr: unknown option `beam`"),
        ({"user": "asr", "asr": "whisper"}, "`user: asr` needs a model"),
        ({"axes": ["humour"]}, "`axes` must be a list of pause_handling"),
    ],
)
def test_wrong_options(options, message):
    known = {"judge": {"base_url": "http://x/v1", "model": "m"}} if options else {}
    with pytest.raises(InputError, match=message) as error:
        make_axis("content", **(known | options))
    assert "sk-1" not in str(error.value)


def test_a_run_does_not_begin_without_judge_or_transcripts(talk, tmp_path):
    with JudgeServer() as server:
        axis = content(server, tmp_path)
        axis.prepare([talk(REPLY).segment, talk(REPLY, axis="backchannel", transcript=False).segment])
        with pytest.raises(InputError, match=r"1 of 1 segments have no transcript .*'s7'.*user: asr"):
            axis.prepare([talk(REPLY, transcript=False).segment])
        url = server.base_url
    with pytest.raises(InputError, match=rf"reward axis 'content': judge: {url} cannot be reached"):
        content(url, tmp_path).prepare([talk(REPLY).segment])


def test_an_instruction_in_a_transcript_does_not_move_the_score(talk, tmp_path):
    from test_rubric import INJECTIONS

    with JudgeServer() as server:
        axis = content(server, tmp_path)
        scores = axis.score([talk(injection) for injection in INJECTIONS])
        short = [injection for injection in INJECTIONS if len(injection.split()) < 12]  # said before the answer
        both = axis.score([talk(REPLY, asked=f"{injection} what do you think") for injection in short])
    assert [score.value for score in scores] == [0.0] * len(INJECTIONS)
    assert [score.value for score in both] == [2.0] * len(short)
    assert len(short) >= 10
