"""The environment against gymnasium's own checker, against itself in other batches, and at its edges."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs import ContextSchedule, DuplexDialogueEnv, DuplexDialogueVectorEnv, EnergyDetector, InputError
from envs.dialogues import UserSides, finish_dialogues, padded_user_audio
from rewards import RewardFunction, RewardSpec

AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")


@pytest.fixture(scope="module")
def reward_function():
    return RewardFunction({axis: RewardSpec() for axis in AXES})


def random_actions(env, frames, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codec = env.codec
    text = torch.randint(0, codec.text_cardinality, (frames, batch, 1), generator=generator)
    audio = torch.randint(0, codec.audio_cardinality, (frames, batch, codec.agent_codebooks), generator=generator)
    return torch.cat([text, audio], dim=-1)


def play(env, segments, actions, context=0.0):
    """Step until all dialogues have ended; gives the last step's outcome and the observations."""
    observation, infos = env.reset(options={"segments": segments, "context": context})
    observations, step = [observation], 0
    frames = infos["frames"]
    while True:
        observation, rewards, terminated, truncated, infos = env.step(actions[step])
        observations.append(observation)
        step += 1
        if (terminated | truncated).all():
            return observations, rewards, terminated, truncated, infos, frames


def test_check_env(nano, silero, one_of_each, reward_function):
    env = gymnasium.make(
        "rlhf_duplex/DuplexDialogue-v0",
        segments=one_of_each,
        codec=nano.codec,
        detector=silero,
        reward_function=reward_function,
        lead_in=0.16,
        max_frames=20,
    )
    check_env(env.unwrapped, skip_render_check=True)


def test_reward_comes_at_the_end_with_its_axes(nano, silero, one_of_each, reward_function):
    segment = next(s for s in one_of_each if s.axis == "turn_taking")
    env = DuplexDialogueEnv([segment], nano.codec, silero, reward_function, lead_in=0.4)
    observation, info = env.reset(seed=3, options={"segment": segment.id})
    assert env.observation_space.contains(observation)
    assert info["frames"] == 5 + np.ceil(segment.duration * 12.5)  # 0.4 s of lead-in are 5 frames
    silence = np.array([3] + [nano.codec.audio_cardinality] * nano.codec.agent_codebooks)
    rewards = []
    while True:
        observation, reward, terminated, truncated, info = env.step(silence)
        rewards.append(reward)
        if terminated or truncated:
            break
    assert terminated
    assert not truncated
    assert set(rewards[:-1]) == {0.0}
    episode = info["episode"]
    # Nobody answered: the reward is minus what is left of the dialogue after the user's turn.
    left = episode.duration - episode.event_time("user_turn_end")
    assert rewards[-1] == pytest.approx(-left)
    assert info["rewards"] == {"turn_taking": pytest.approx(-left)}
    assert episode.agent_speech == []
    assert episode.scored_from == pytest.approx(0.4)
    assert episode.user_speech[0].start >= 0.3


def test_episodes_that_are_fetched_later_are_the_same(nano, silero, one_of_each):
    """The next dialogues begin and end before the first ones' episodes are asked for."""
    env = DuplexDialogueVectorEnv(one_of_each, nano.codec, silero, max_frames=12, lead_in=0.4)
    actions = random_actions(env, 12, 4)
    expected = play(env, one_of_each[:2], actions[:, :2])[4]["episodes"]
    fetch = []
    for rows in (slice(0, 2), slice(2, 4)):
        env.reset(options={"segments": one_of_each[rows], "context": 0.0, "later": True})
        for frame in range(12):
            _, rewards, _, truncated, infos = env.step(actions[frame, rows])
        assert truncated.all()
        assert rewards.tolist() == [0, 0]
        assert set(infos) == {"later"}
        fetch.append(infos["later"])
    first = fetch[0]()
    assert [e.segment.id for e in fetch[1]()] == [s.id for s in one_of_each[2:4]]
    assert [e.segment.id for e in first] == [e.segment.id for e in expected]
    for ours, theirs in zip(first, expected, strict=True):
        assert np.array_equal(ours.agent_audio, theirs.agent_audio)
        assert ours.agent_speech == theirs.agent_speech


def test_truncation_at_the_frame_limit(nano, silero, one_of_each):
    env = DuplexDialogueVectorEnv(one_of_each[:2], nano.codec, silero, max_frames=7)
    segments = [s.id for s in one_of_each[:2]]
    _, _, terminated, truncated, infos, _ = play(env, segments, random_actions(env, 7, 2))
    assert truncated.all()
    assert not terminated.any()
    assert [e.duration for e in infos["episodes"]] == [pytest.approx(7 / 12.5)] * 2
    assert all(i.end <= 7 / 12.5 for e in infos["episodes"] for i in e.user_speech)  # what was not heard yet
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(random_actions(env, 1, 2)[0])


def test_an_episode_is_the_same_in_any_order_and_batch(nano, silero, one_of_each, reward_function):
    env = DuplexDialogueVectorEnv(one_of_each, nano.codec, silero, reward_function=reward_function, lead_in=0.4)
    ids = [s.id for s in one_of_each]
    actions = random_actions(env, 400, 4)
    _, rewards, _, _, infos, frames = play(env, ids, actions)
    order = [2, 0, 3, 1]
    _, swapped_rewards, _, _, swapped, _ = play(env, [ids[i] for i in order], actions[:, order])
    fresh = DuplexDialogueVectorEnv(one_of_each, nano.codec, silero, reward_function=reward_function, lead_in=0.4)
    for place, row in enumerate(order):
        _, lone_rewards, _, _, lone, lone_frames = play(fresh, [ids[row]], actions[:, row : row + 1])
        assert lone_frames[0] == frames[row]
        assert rewards[row] == swapped_rewards[place] == lone_rewards[0]
        for other in (swapped["episodes"][place], lone["episodes"][0]):
            episode = infos["episodes"][row]
            assert np.allclose(episode.agent_audio, other.agent_audio, atol=1e-5)
            assert np.array_equal(episode.user_audio, other.user_audio)
            assert episode.agent_speech == other.agent_speech
            assert episode.text == other.text


def test_observations_are_the_users_codes(nano, silero, one_of_each):
    env = DuplexDialogueVectorEnv(one_of_each, nano.codec, silero, lead_in=0.4)
    segment = one_of_each[0]
    frames = 5 + int(np.ceil(segment.duration * 12.5))
    observations, *_ = play(env, [segment.id], random_actions(env, frames, 1))
    user = env.user_sides.get([(segment, 0.0)])[0]
    codes = nano.codec.encode(torch.from_numpy(user.audio)[None])[0]
    assert torch.equal(torch.stack(observations[:-1], dim=-1)[0], codes)
    assert (user.audio[: 5 * nano.codec.frame_samples] == 0).all()


def test_context_precedes_the_segment_in_whole_frames(nano, silero, one_of_each):
    segment = replace(one_of_each[0], id="later", start=one_of_each[0].start + 1.0, events={"pauses": []})
    env = DuplexDialogueVectorEnv([segment], nano.codec, silero, lead_in=0.4)
    env.reset(options={"segments": [segment], "context": 0.5})
    # 0.5 s are 6.25 frames: 6 whole ones, 0.48 s; with 0.4 s of lead-in the window begins at 0.88 s.
    assert env._users[0].scored_from == pytest.approx(0.88)
    # No more than there is before the segment.
    env.reset(options={"segments": [segment], "context": 1e9})
    assert env._users[0].scored_from <= 0.4 + segment.start


def test_a_user_is_known_by_what_is_said_not_by_the_id(nano, silero, one_of_each):
    # Two manifests may use the same id for other windows of the same recording.
    whole = replace(one_of_each[0], events={})
    half = replace(whole, end=whole.start + whole.duration / 2)
    env = DuplexDialogueVectorEnv([whole], nano.codec, silero, lead_in=0.4)
    users = env.user_sides.get([(whole, 0.0), (half, 0.0)])
    assert [user.segment for user in users] == [whole, half]
    assert users[0].frames > users[1].frames


def test_seed_decides_what_is_played(nano, silero, nano_segments):
    env = DuplexDialogueVectorEnv(
        nano_segments, nano.codec, silero, num_envs=3, context=ContextSchedule(0.5, 1.0), max_frames=2
    )
    first = env.reset(seed=5)[1]["segments"]
    again = env.reset(seed=5)[1]["segments"]
    other = env.reset(seed=6)[1]["segments"]
    assert first == again
    assert first != other


def test_unknown_segment_and_no_segment(nano, silero, one_of_each):
    env = DuplexDialogueVectorEnv(one_of_each, nano.codec, silero)
    with pytest.raises(InputError, match="no segment has the id 'nowhere'"):
        env.reset(options={"segments": ["nowhere"]})
    with pytest.raises(InputError, match="at least one segment"):
        DuplexDialogueVectorEnv([], nano.codec, silero)


def test_both_channels_of_a_recording_are_two_users(nano, one_of_each):
    segment = replace(one_of_each[0], events={})
    other = replace(segment, user_channel=1 - segment.user_channel)
    users = UserSides(nano.codec, EnergyDetector(), 0.4).get([(segment, 0.0), (other, 0.0)])
    for user, expected in zip(users, (segment, other), strict=True):
        assert np.array_equal(user.audio, padded_user_audio(expected, nano.codec, 0.4))
    assert not np.array_equal(users[0].audio, users[1].audio)


def test_context_is_what_the_recording_has_before_the_segment(nano, one_of_each):
    # 0.5 s of context are 6 whole frames, 0.48 s: the same audio as a segment that begins so much earlier.
    segment = replace(one_of_each[0], start=one_of_each[0].start + 1.0, events={})
    earlier = replace(segment, start=segment.start - 6 / 12.5)
    users = UserSides(nano.codec, EnergyDetector(), 0.4)
    (with_context,), (without,) = users.get([(segment, 0.5)]), users.get([(earlier, 0.0)])
    assert len(with_context.audio) == len(without.audio)
    assert np.array_equal(with_context.audio, without.audio)
    assert with_context.audio[5 * nano.codec.frame_samples :].any()


def test_users_are_kept_while_they_come_back_and_there_is_room(nano, one_of_each):
    heard = []

    class Counting(EnergyDetector):
        def detect(self, clips, sample_rate):
            heard.append(len(clips))
            return super().detect(clips, sample_rate)

    first, second, third = (replace(s, start=s.start + 1.0, events={}) for s in one_of_each[:3])
    users = UserSides(nano.codec, Counting(), 0.4)
    users.get([(first, 0.0), (second, 0.5)])
    users.get([(second, 0.5), (third, 0.0)])  # the next batch of a group
    users.get([(first, 0.0), (third, 0.0)])
    assert heard == [2, 1]
    users.get([(second, 0.5)])  # its context was another group's since
    assert heard == [2, 1, 1]

    size = users.get([(first, 0.0)])[0].audio.nbytes
    small = UserSides(nano.codec, Counting(), 0.4, capacity=size)
    heard.clear()
    given = small.get([(second, 0.0), (first, 0.0)])
    assert [len(user.audio) > 0 for user in given] == [True, True]  # more than is kept, all the same
    small.get([(first, 0.0)])
    small.get([(second, 0.0)])
    assert heard == [2, 1]


def test_words_have_the_times_of_their_frames(nano, one_of_each):
    user = UserSides(nano.codec, EnergyDetector(), 0.4).get([(one_of_each[0], 0.0)])
    text = torch.full((1, 12), 3)
    for frame, word in ((3, "good"), (8, "help")):
        tokens = nano.tokenizer.encode(word)
        text[0, frame : frame + len(tokens)] = torch.tensor(tokens)
    nothing = torch.full((1, 12, nano.codec.agent_codebooks), nano.codec.audio_cardinality)
    (episode,) = finish_dialogues(
        user, torch.cat([text[..., None], nothing], dim=-1), [12], nano.codec, EnergyDetector()
    )
    lengths = [len(nano.tokenizer.encode(word)) for word in ("good", "help")]
    assert [word.text for word in episode.words] == ["good", "help"]
    assert [word.start for word in episode.words] == pytest.approx([3 / 12.5, 8 / 12.5])
    assert [word.end for word in episode.words] == pytest.approx([(3 + lengths[0]) / 12.5, (8 + lengths[1]) / 12.5])
