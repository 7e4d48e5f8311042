"""Speech recognition through the real transformers pipeline, on random weights of the real classes made here."""

import json
from dataclasses import replace

import numpy as np
import pytest

from envs import InputError, Interval
from rewards.transcripts import SpeechRecogniser, load_recogniser, make_transcriber

LETTERS = "|ETAOINSHRDLU"


@pytest.fixture(scope="session")
def ctc_folder(tmp_path_factory):
    """A wav2vec2 of the real class, a few thousand weights large, with its tokenizer; it hears nothing but letters."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
    from transformers import Wav2Vec2Processor as Processor

    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{c: n + 4 for n, c in enumerate(LETTERS)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    Processor(extractor, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        pad_token_id=0,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.bias[:4] -= 1e4  # nothing but letters and spaces: random weights then say something
        model.lm_head.weight *= 30
    model.save_pretrained(folder, safe_serialization=True)
    yield str(folder)
    load_recogniser.cache_clear()


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """A Whisper of the real class with random weights and a byte-level tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers import WhisperTokenizerFast as Fast

    folder = tmp_path_factory.mktemp("whisper")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    special += [f"<|{n * 0.02:.2f}|>" for n in range(1501)]
    bpe = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = Fast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[0], unk_token=special[0], pad_token=special[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(special[0])
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end + 1, max_target_positions=448,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = list(range(end, len(tokenizer)))
    model.save_pretrained(folder, safe_serialization=True)
    yield str(folder)
    load_recogniser.cache_clear()


@pytest.fixture
def heard(episode):
    """A function that gives an episode of 6 s at 8 kHz (2 s before the segment) of which two stretches are speech."""

    def make(seed, agent=((2.5, 3.2), (4.5, 5.5)), user=((0.5, 1.5), (2.2, 2.9))):
        rng = np.random.default_rng(seed)
        audio = [rng.normal(0, 0.1, 48000).astype(np.float32) for _ in range(2)]
        speech = [[Interval(*pair) for pair in side] for side in (user, agent)]
        return replace(
            episode("turn_taking", duration=6.0), user_audio=audio[0], agent_audio=audio[1], sample_rate=8000,
            user_speech=speech[0], agent_speech=speech[1],
        )  # fmt: skip

    return make


def test_each_utterance_is_recognised_at_its_time(ctc_folder, heard):
    episodes = [heard(0), heard(1, agent=()), heard(2)]
    recogniser = SpeechRecogniser("agent", ctc_folder, batch_size=3)
    found = recogniser.words(episodes)
    # 3.2 to 4.5 s is a silence of more than a second: two utterances. Silence is not transcribed.
    assert [[(w.start, w.end) for w in row] for row in found] == [
        [(2.5, 3.2), (4.5, 5.5)],
        [],
        [(2.5, 3.2), (4.5, 5.5)],
    ]
    assert all(set(w.text) <= set(LETTERS + " ") and w.text for row in found for w in row)
    assert found[0][0].text != found[2][0].text  # it is the audio that decides
    # One by one it is the same, but for what these random weights hear in the silence that pads a shorter clip.
    alone = SpeechRecogniser("agent", ctc_folder, batch_size=1).words(episodes)
    for one, beside in zip(alone[0] + alone[2], found[0] + found[2], strict=True):
        assert one[1:] == beside[1:]
        assert beside.text.startswith(one.text)
    assert alone[0][1] == found[0][1]  # the longest is not padded
    assert recogniser.words([]) == []


def test_words_have_times_where_the_model_has_them(ctc_folder, heard):
    [found] = SpeechRecogniser("agent", ctc_folder, timestamps=True).words([heard(0)])
    assert len(found) >= 2
    assert all(2.4 <= w.start <= w.end <= 5.6 for w in found)
    starts = [w.start for w in found]
    assert starts == sorted(starts)
    assert all(not 3.4 < start < 4.3 for start in starts)


def test_the_users_side_is_recognised_once_a_segment(ctc_folder, heard, monkeypatch):
    recogniser = SpeechRecogniser("user", ctc_folder)
    clips = []
    pipe = load_recogniser(ctc_folder, "cpu", "float32")
    monkeypatch.setattr("rewards.transcripts.load_recogniser", lambda *_: _Counting(pipe, clips))
    group = [heard(0) for _ in range(4)]
    found = recogniser.words(group)
    assert found[0] == found[3]
    # 0.5-1.5 s is context, before the segment begins at 2 s; 2.2-2.9 s is in it. Four episodes, two clips.
    assert [(w.start, w.end) for w in found[0]] == [(0.5, 1.5), (2.2, 2.9)]
    assert len(clips) == 2
    # The next update plays the segment with another 1 s of context (and so a second later): only that is new.
    silence = np.zeros(8000, np.float32)
    later = replace(
        group[0],
        scored_from=3.0,
        duration=7.0,
        user_audio=np.concatenate([silence, group[0].user_audio]),
        user_speech=[Interval(1.5, 2.5), Interval(3.2, 3.9)],
    )
    [again] = recogniser.words([later])
    assert [(w.start, w.end) for w in again] == [(1.5, 2.5), (pytest.approx(3.2), pytest.approx(3.9))]
    assert again[1].text == found[0][1].text
    assert len(clips) == 3


class _Counting:
    """The real pipeline, with what it was given."""

    def __init__(self, pipe, clips):
        self.pipe, self.clips, self.feature_extractor = pipe, clips, pipe.feature_extractor

    def __call__(self, audio, **options):
        self.clips.extend(audio)
        return self.pipe(audio, **options)


def test_whisper(whisper_folder, heard):
    episodes = [heard(0), heard(1)]
    short = {"max_new_tokens": 6}  # random weights know no end
    found = SpeechRecogniser("agent", whisper_folder, batch_size=4, generate=short).words(episodes)
    assert [[(w.start, w.end) for w in row] for row in found] == [[(2.5, 3.2), (4.5, 5.5)]] * 2
    assert all(w.text for row in found for w in row)


def test_a_long_utterance_is_cut_to_what_whisper_hears(whisper_folder, heard):
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, 8000 * 66).astype(np.float32)
    episode = replace(heard(0), duration=66.0, agent_audio=audio, agent_speech=[Interval(3.0, 65.0)])
    [found] = SpeechRecogniser("agent", whisper_folder, generate={"max_new_tokens": 6}).words([episode])
    assert [(w.start, w.end) for w in found] == [
        (3.0, pytest.approx(3 + 62 / 3)),
        (pytest.approx(3 + 62 / 3), pytest.approx(3 + 124 / 3)),
        (pytest.approx(3 + 124 / 3), 65.0),
    ]


def test_a_user_who_says_something_else_in_the_same_segment_is_heard_anew(ctc_folder, heard):
    one, other = SpeechRecogniser("user", ctc_folder).words([heard(0), heard(1)])
    assert [w.text for w in one] != [w.text for w in other]


def test_models_that_cannot_be_used(tmp_path, ctc_folder, heard):
    (tmp_path / "empty").mkdir()
    recogniser = SpeechRecogniser("agent", str(tmp_path / "empty"))
    with pytest.raises(
        InputError, match=r"asr: model '.*empty' cannot be loaded on cpu .*give a hub id or a local folder"
    ):
        recogniser.prepare([])
    SpeechRecogniser("agent", ctc_folder).prepare([])
    with pytest.raises(InputError, match="cannot be loaded on nowhere"):
        SpeechRecogniser("agent", ctc_folder, device="nowhere").prepare([])
    with pytest.raises(InputError, match="batch_size must be"):
        make_transcriber("agent", "asr", {"model": "m", "batch_size": 0})
