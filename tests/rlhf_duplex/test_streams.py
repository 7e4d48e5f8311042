"""Words on the text stream, and dialogues on the frame grid: the same columns as an episode that was played."""

import numpy as np
import pytest
import torch

from envs.dialogues import UserSides
from envs.episode import Word
from envs.vector import DuplexDialogueVectorEnv
from rlhf_duplex.data.streams import Streams, TextAligner
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.rollout import rollout

PAD, EPAD = 3, 0


class Letters:
    """A tokenizer of which a word's tokens are known: one a letter, 10 for a."""

    def encode(self, word):
        return [ord(letter) - 87 for letter in word]


@pytest.fixture
def aligner():
    return TextAligner(Letters(), PAD, EPAD, 12.5)


def test_a_word_begins_at_its_onset_frame_with_epad_before_it(aligner):
    # 0.39 s lies in frame 4 (0.32 to 0.40), 0.40 s in frame 5.
    assert aligner.place([Word("ab", 0.39, 0.6)], 9).tolist() == [3, 3, 3, 0, 10, 11, 3, 3, 3]
    assert aligner.place([Word("ab", 0.40, 0.6)], 9).tolist() == [3, 3, 3, 3, 0, 10, 11, 3, 3]
    assert aligner.place([Word("ab", 0.0, 0.6)], 4).tolist() == [10, 11, 3, 3]
    assert aligner.place([], 3).tolist() == [3, 3, 3]


def test_words_in_a_row(aligner):
    # Frames 1 and 3: no PAD between them is left for an EPAD of the second, whose predecessor is a token.
    assert aligner.place([Word("ab", 0.08, 0.24), Word("c", 0.24, 0.4)], 6).tolist() == [0, 10, 11, 12, 3, 3]
    # The second begins in frame 2, while the first has a token left: it is cut off (keep_and_shift is off).
    assert aligner.place([Word("abc", 0.08, 0.16), Word("d", 0.20, 0.4)], 6).tolist() == [0, 10, 13, 3, 3, 3]
    # Both in one frame: the later one is kept.
    assert aligner.place([Word("a", 0.08, 0.10), Word("b", 0.12, 0.2)], 4).tolist() == [0, 11, 3, 3]
    # No duration, and beyond the end: left out.
    assert aligner.place([Word("a", 0.08, 0.08), Word("b", 0.4, 0.5)], 4).tolist() == [3, 3, 3, 3]


def test_like_moshi_finetune(nano):
    """Against the rule of moshi-finetune's Interleaver, written out frame by frame."""
    aligner = TextAligner.of(nano)
    rng = np.random.default_rng(0)
    vocabulary = ["That", "curious", "sounds", "plan", "neighbour", "good", "the", "photographs"]
    for _ in range(20):
        starts = np.sort(rng.uniform(0, 6, 15))
        words = [Word(str(rng.choice(vocabulary)), float(s), float(s + rng.uniform(0, 0.4))) for s in starts]
        expected, queue, index = [PAD] * 80, [], 0
        for t in range(80):
            while index < len(words) and words[index].start * 12.5 < t + 1:
                queue = list(nano.tokenizer.encode(words[index].text))
                index += 1
            if queue:
                if t > 0 and expected[t - 1] == PAD:
                    expected[t - 1] = EPAD
                expected[t] = queue.pop(0)
        assert aligner.place(words, 80).tolist() == expected


def test_words_and_back(nano):
    streams = Streams(nano)
    words = [Word("neighbour", 0.5, 1.0), Word("sounds", 1.6, 2.0), Word("good", 2.0, 2.4)]
    found = streams.words(streams.aligner.place(words, 60).tolist())
    assert [w.text for w in found] == ["neighbour", "sounds", "good"]
    assert [w.start for w in found] == [0.48, 1.6, 2.0]  # the onset's frame
    assert found[1].end == 2.0  # where the next begins
    assert found[2].end == pytest.approx(2.08 + 0.6)  # or a little after its last token
    assert streams.words([PAD, EPAD, PAD]) == []


def test_what_the_tokenizer_can_say(nano):
    aligner = TextAligner.of(nano)
    assert aligner.sayable("plan")
    assert not aligner.sayable("7")
    assert not aligner.sayable("é")
    assert not aligner.sayable("")


@pytest.fixture(scope="module")
def played(nano, one_of_each, silero):
    policy = MoshiPolicy(nano.lm, Sampling(1.0, 0, 0.8, 0))
    segment = next(s for s in one_of_each if s.axis == "turn_taking")
    env = DuplexDialogueVectorEnv([segment], nano.codec, silero, user_sides=UserSides(nano.codec, silero, 1.0))
    [episode] = rollout(policy, env, [segment], [5], [0.0])
    return episode


def test_columns_are_those_of_an_episode(nano, played):
    """What is heard of an episode, laid out by `Streams`, is what the policy itself has in its columns."""
    streams = Streams(nano)
    tokens = torch.from_numpy(np.concatenate([played.text_tokens[None], played.audio_tokens]))
    frames = tokens.shape[1]
    heard = streams.heard(played.agent_audio, played.user_audio, [], frames)
    columns = streams.columns(heard)
    assert columns.shape == (streams.codec.agent_codebooks * 2 + 1, frames - max(streams.max_delay, 1))
    user = slice(1 + streams.codec.agent_codebooks, None)
    assert torch.equal(columns[user], tokens[user, : columns.shape[1]])
    # The agent's codes were drawn, not encoded: decoded as they are heard, they are the episode's audio.
    audio = streams.codec.decode(streams.agent_frames(tokens)[None])[0].numpy()[: len(played.agent_audio)]
    late = slice(25 * streams.codec.frame_samples, len(played.agent_audio) - 2 * streams.codec.frame_samples)
    assert np.corrcoef(audio[late], played.agent_audio[late])[0, 1] > 0.98
    again = streams.codec.decode(streams.user_frames(tokens)[None])[0].numpy()
    whole = streams.codec.decode(heard[user][None])[0].numpy()
    inner = slice(25 * streams.codec.frame_samples, len(whole) - 2 * streams.codec.frame_samples)
    assert np.corrcoef(again[inner], whole[inner])[0, 1] > 0.98


def test_silence_has_no_beginning(nano, silero):
    streams = Streams(nano)
    codes = streams.silence(40)
    assert codes.shape == (streams.codec.agent_codebooks, 40)
    assert torch.equal(codes[:, :10], streams.silence(10))
    assert silero.detect([streams.codec.decode(codes[None])[0].numpy()], streams.codec.sample_rate) == [[]]


def test_a_prefilled_dialogue_goes_on_as_it_would_have(nano, played):
    """Acting after a prefill of the first n columns gives the very tokens of the dialogue that acted all along."""
    policy = MoshiPolicy(nano.lm, Sampling(1.0, 0, 0.8, 0))
    tokens = torch.from_numpy(np.concatenate([played.text_tokens[None], played.audio_tokens]))
    frames, done = tokens.shape[1], 40
    policy.begin([5], frames)
    policy.prefill(tokens[None, :, :done])
    for frame in range(done, frames):
        policy.act(tokens[None, 1 + policy.agent_codebooks :, frame - 1])
    codes = policy.trajectory().codes[0]
    policy.end()
    complete = frames - policy.max_delay
    assert torch.equal(codes[:, :complete], tokens[:, :complete])
    assert torch.isin(codes[0, done:], torch.tensor([PAD, EPAD]), invert=True).any()  # it did say something


def test_prefill_at_the_wrong_time(nano):
    policy = MoshiPolicy(nano.lm)
    codes = torch.zeros(1, 17, 5, dtype=torch.long)
    with pytest.raises(RuntimeError, match="right after begin"):
        policy.prefill(codes)
    policy.begin([0], 5)
    with pytest.raises(RuntimeError, match="begun for 5 frames, 5 cannot be prefilled"):
        policy.prefill(codes)
    policy.act(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(RuntimeError, match="right after begin"):
        policy.prefill(codes[:, :, :2])
    policy.end()
