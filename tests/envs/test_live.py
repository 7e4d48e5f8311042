"""Live dialogues: a user that hears and reacts, as an environment, on nano."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs import (
    DuplexLiveVectorEnv,
    EnergyDetector,
    InputError,
    ScriptedUser,
    dialogue_segments,
    draw_scripts,
    utterance_bank,
)
from envs.ear import Ear
from envs.episode import Episode
from envs.frames import frames_in
from envs.scripted_user import Move, Script
from envs.segments import Segment
from rewards import RewardFunction, RewardSpec
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.codec_stream import MimiStream, PolicyUser
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import rollout

FRAME = 0.08


@pytest.fixture(scope="module")
def bank(nano, silero, nano_segments):
    chosen = [s for axis in {s.axis for s in nano_segments} for s in nano_segments if s.axis == axis]
    by_axis = {axis: [s for s in chosen if s.axis == axis][:3] for axis in {s.axis for s in chosen}}
    return utterance_bank([s for row in by_axis.values() for s in row], silero, nano.codec.sample_rate)


@pytest.fixture(scope="module")
def stream(nano):
    return MimiStream(nano.codec)


def agent_codes(nano, seconds, spoken, voice):
    """The agent's codes `(8, T)` of a voice that speaks in these intervals."""
    audio = np.zeros(frames_in(seconds, 12.5) * nano.codec.frame_samples, dtype=np.float32)
    for start, end in spoken:
        first = round(start * nano.codec.sample_rate)
        part = voice[: round((end - start) * nano.codec.sample_rate)][: len(audio) - first]
        audio[first : first + len(part)] = part
    return nano.codec.encode(torch.from_numpy(audio)[None])[0]


def play(nano, silero, stream, script, seconds, spoken, voice, lead_in=0.4):
    """A dialogue with an agent that speaks in these intervals whatever the user does."""
    user = ScriptedUser([script], nano.codec, stream, silero, lead_in)
    (dialogue,) = dialogue_segments([script.id], seconds)
    env = DuplexLiveVectorEnv([dialogue], user, nano.codec, silero, lead_in=lead_in)
    env.reset(options={"segments": [dialogue]})
    frames = frames_in(lead_in, 12.5) + frames_in(seconds, 12.5)
    codes = agent_codes(nano, frames / 12.5, spoken, voice)
    for frame in range(codes.shape[1]):
        action = torch.cat([torch.tensor([3]), codes[:, frame]])[None]
        _, _, terminated, truncated, infos = env.step(action)
    assert terminated.all()
    assert not truncated.any()
    return infos["episodes"][0]


@pytest.fixture(scope="module")
def voice(bank):
    """Real speech without a pause of note, 3 s and more."""
    return np.concatenate([utterance.audio for utterance in bank["turn"]])


def test_bank_is_cut_by_events(bank, nano_segments):
    turn = next(u for u in bank["turn"])
    source = next(s for s in nano_segments if s.id == turn.source)
    said = [word for word, _, who in source.transcript if who == "user"]
    assert [word for word, *_ in turn.words] == said
    assert turn.seconds == pytest.approx(source.events["user_turn_end"] - source.start, abs=0.2)
    barge = bank["interruption"][0]
    source = next(s for s in nano_segments if s.id == barge.source)
    start, end = source.events["interruption"]
    assert barge.seconds == pytest.approx(end - start + 0.1, abs=0.01)
    assert {kind: len(found) for kind, found in bank.items()} == dict.fromkeys(bank, 3)
    assert all(abs(u.audio[0]) < 1e-6 for row in bank.values() for u in row)  # no click


def test_bank_without_a_turn(nano, silero, nano_segments):
    with pytest.raises(InputError, match="needs recorded turns"):
        utterance_bank([s for s in nano_segments if s.axis == "backchannel"][:1], silero, 8000)


def test_ear_hears_what_the_detector_hears(silero, nano_segments, nano):
    rate = nano.codec.sample_rate
    clip = nano_segments[0].user_audio(rate)
    silence = np.zeros_like(clip)
    ear = Ear(silero, rate)
    ear.begin(2)
    size = nano.codec.frame_samples
    rows = [ear.hear(np.stack([clip, silence])[:, i : i + size]) for i in range(0, len(clip) - size, size)]
    heard = np.array(rows)
    assert not heard[:, 1].any()
    (speech,) = silero.detect([clip], rate)
    offline = np.array([any(i.start <= (f + 1) * FRAME <= i.end for i in speech) for f in range(len(heard))])
    assert np.mean(heard[:, 0] == offline) > 0.9  # the ear cannot know the future: edges come a little later
    with pytest.raises(InputError, match="only Silero"):
        Ear(EnergyDetector(), rate)


def test_the_user_waits_and_goes_on(nano, silero, stream, bank, voice):
    turn = bank["turn"][0]
    moves = (Move(turn, 0.4, 3.0, None, False), Move(bank["turn"][1], 0.4, 3.0, None, False))
    script = Script("waits", moves)
    end = 0.4 + turn.seconds
    # The agent answers from 1 to 3 s after the user's end: the user goes on 0.4 s after that.
    answered = play(nano, silero, stream, script, 12.0, [(end + 1.0, end + 3.0)], voice)
    second = next(i.start for i in answered.user_speech if i.start > end + 0.5)
    assert second == pytest.approx(end + 3.4, abs=0.45)
    # Nobody answers: the user goes on when its patience is at its end.
    silent = play(nano, silero, stream, script, 12.0, [], voice)
    second = next(i.start for i in silent.user_speech if i.start > end + 0.5)
    assert second == pytest.approx(end + 3.0, abs=0.35)
    assert silent.agent_speech == []
    words = [word for word, *_ in turn.words]
    assert [word for word, *_ in silent.segment.transcript][: len(words)] == words
    assert silent.event_time("user_turn_end") == pytest.approx(end, abs=0.1)


def test_the_user_barges_in_and_yields(nano, silero, stream, bank, voice):
    turn, barge = bank["turn"][0], bank["interruption"][0]
    end = 0.4 + turn.seconds
    script = Script("barges", (Move(turn, 0.4, 3.0, None, False), Move(barge, 0.4, 3.0, 1.0, False)))
    episode = play(nano, silero, stream, script, 12.0, [(end + 0.5, end + 5.0)], voice)
    ((start, _),) = episode.event_intervals("barge_ins")
    assert start == pytest.approx(end + 1.5, abs=0.45)  # after 1 s of agent speech
    # Talked over for 1.2 s, a user that yields stops; one that does not says all of it.
    over = [(1.0, 4.0)]
    for yields in (True, False):
        said = play(nano, silero, stream, Script("y", (Move(turn, 0.4, 3.0, None, yields),)), 7.0, over, voice)
        given_up = said.segment.events["yields"]
        assert len(given_up) == yields
        expected = 2.2 if yields else end
        assert said.event_time("user_turn_end") == pytest.approx(expected, abs=0.5)


def test_an_episode_that_breaks_off_is_saved_and_its_times_are_those_of_the_audio(
    nano, silero, stream, bank, voice, tmp_path
):
    turn, barge = bank["turn"][0], bank["interruption"][0]
    end = 1.04 + turn.seconds  # a lead-in of 1 s is 13 frames
    script = Script("breaks", (Move(turn, 0.4, 3.0, None, False), Move(barge, 0.4, 3.0, 1.0, False)))
    # Cut while the user still barges in: 0.2 s into it.
    begun = play(nano, silero, stream, script, 12.0, [(end + 0.5, end + 5.0)], voice, lead_in=1.0)
    assert begun.scored_from == pytest.approx(1.04)
    assert begun.event_time("user_turn_end") == pytest.approx(end, abs=0.045)
    ((start, _),) = begun.event_intervals("barge_ins")
    seconds = round(start - 1.04 + 0.2, 2)
    cut = play(nano, silero, stream, script, seconds, [(end + 0.5, end + 5.0)], voice, lead_in=1.0)
    ((_, last),) = cut.event_intervals("barge_ins")
    assert last <= cut.duration + 1e-6
    cut.save(tmp_path / "episode")
    assert Episode.load(tmp_path / "episode").segment.events == cut.segment.events


def test_a_lead_in_of_less_than_a_frame_is_refused(nano, silero, stream, bank):
    with pytest.raises(InputError, match=r"lead_in must be at least a frame, 0\.08 s, found 0"):
        ScriptedUser(draw_scripts(bank, 1, seed=4, seconds=6.0), nano.codec, stream, silero, 0)


def test_nano_talks_the_same_in_any_company(nano, silero, stream, bank):
    scripts = draw_scripts(bank, 3, seed=4, seconds=6.0)
    assert scripts == draw_scripts(bank, 3, seed=4, seconds=6.0)
    dialogues = dialogue_segments([s.id for s in scripts], 6.0)
    policy = MoshiPolicy(nano.lm)

    def talk(rows, at_once=3):
        user = ScriptedUser(scripts, nano.codec, stream, silero, 0.4)
        env = DuplexLiveVectorEnv(dialogues, user, nano.codec, silero, lead_in=0.4)
        chosen, seeds = [dialogues[i] for i in rows], [10 + i for i in rows]
        return rollout(policy, env, chosen, seeds, [0.0] * len(rows), batch_size=at_once)

    together = talk([0, 1, 2])
    # One whose audio is decoded and heard after the next dialogues have begun is the same, too.
    for row, alone in ((1, talk([1])[0]), (2, talk([2, 0])[0]), (0, talk([0, 1, 2], at_once=2)[0])):
        assert np.array_equal(together[row].text_tokens, alone.text_tokens)
        assert together[row].agent_speech == alone.agent_speech
        assert together[row].user_speech == alone.user_speech
        assert together[row].segment.events == alone.segment.events
    assert all(episode.duration == pytest.approx(6.4) for episode in together)
    assert all(episode.scored_from == pytest.approx(0.4) for episode in together)


def test_check_env(nano, silero, stream, bank):
    scripts = draw_scripts(bank, 4, seed=0, seconds=6.0)
    env = gymnasium.make(
        "rlhf_duplex/DuplexLive-v0",
        dialogues=dialogue_segments([s.id for s in scripts], 6.0),
        user=ScriptedUser(scripts, nano.codec, stream, silero, 0.16),
        codec=nano.codec,
        detector=silero,
        reward_function=RewardFunction({"fluency": RewardSpec()}),
        lead_in=0.16,
        max_frames=12,
    )
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=1)
    for _ in range(12):
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert (terminated, truncated) == (False, True)
    assert "episode" in info
    assert np.isfinite(reward)
    with pytest.raises(RuntimeError, match="call reset"):
        env.unwrapped.step(env.action_space.sample())


def test_a_second_policy_is_the_user(nano, silero):
    from pathlib import Path

    from envs.segments import Segment

    dialogues = [Segment(f"p{i}", "turn_taking", Path("p.live"), 1, 0.0, 4.0) for i in range(2)]
    other = MoshiPolicy(load_bundle("nano").lm)
    seeds = {"p0": 5, "p1": 6}

    def talk():
        user = PolicyUser(other, nano.codec, 50, lambda segment: seeds[segment.id])
        env = DuplexLiveVectorEnv(dialogues, user, nano.codec, silero, lead_in=0.0)
        return rollout(MoshiPolicy(nano.lm), env, dialogues, [1, 2], [0.0, 0.0])

    first, second = talk(), talk()
    for one, again in zip(first, second, strict=True):
        assert np.array_equal(one.text_tokens, again.text_tokens)
        assert np.array_equal(one.user_audio, again.user_audio)
        assert len(one.user_audio) == len(one.agent_audio) == 50 * nano.codec.frame_samples


def test_a_second_policy_hears_the_agent(nano, silero, bank):
    """Nano as the user: spoken to, it says something else than when nobody speaks to it."""
    dialogue = Segment("p", "turn_taking", Path("p.live"), 1, 0.0, 9.6)
    other = MoshiPolicy(load_bundle("nano").lm)
    turn = bank["turn"][0].audio
    said = []
    for spoken in ([(0.4, 0.4 + len(turn) / nano.codec.sample_rate)], []):
        codes = agent_codes(nano, 9.6, spoken, turn)
        user = PolicyUser(other, nano.codec, 120, lambda segment: 5)
        env = DuplexLiveVectorEnv([dialogue], user, nano.codec, silero, lead_in=0.0)
        env.reset(options={"segments": [dialogue]})
        for frame in range(120):
            _, _, _, _, infos = env.step(torch.cat([torch.tensor([3]), codes[:, frame]])[None])
        said.append(infos["episodes"][0].user_audio)
    assert not np.array_equal(*said)
    first = int(0.4 * nano.codec.sample_rate)
    assert np.allclose(said[0][:first], said[1][:first], atol=1e-5)  # before anybody spoke they are the same


def test_dialogues_that_cannot_be(nano, silero, stream, bank):
    scripts = draw_scripts(bank, 2, seed=0, seconds=4.0)
    user = ScriptedUser(scripts, nano.codec, stream, silero, 0.4)
    first, second = dialogue_segments([scripts[0].id], 4.0), dialogue_segments([scripts[1].id], 5.0)
    with pytest.raises(InputError, match="same length"):
        DuplexLiveVectorEnv(first + second, user, nano.codec, silero)
    with pytest.raises(InputError, match="at least one dialogue"):
        DuplexLiveVectorEnv([], user, nano.codec, silero)
    with pytest.raises(InputError, match="no segment has the id 'nobody'"):
        DuplexLiveVectorEnv(first, user, nano.codec, silero).reset(options={"segments": ["nobody"]})
