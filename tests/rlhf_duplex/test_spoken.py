"""Spoken questions, refusals and speech quality: the match by hand, and the whole path on nano."""

import importlib.util
import json

import numpy as np
import pytest
import soundfile
from rater import Rater

from envs.errors import InputError
from experiments.judge.server import JudgeServer
from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.speech_quality import Predictor, load_predictor, predict_quality
from rlhf_duplex.evaluation.spoken import answered, read_items, words_in

RATE = 8000


def test_normalised_match_by_hand():
    assert words_in("The  Eiffel-Tower, in   Pâris!") == ["the", "eiffel", "tower", "in", "paris"]
    assert words_in("it's a dog_") == words_in("it\u2019s a dog") == ["its", "a", "dog"]
    assert answered("I believe it is Paris, France.", ["London", "paris france"])
    assert not answered("I believe it is Parisian", ["Paris"])  # whole words
    assert not answered("France, Paris", ["Paris France"])  # in order
    assert not answered("", ["Paris"])
    assert answered("it opens at nine", ["The nine"])
    assert answered("I would take a", ["A"])  # an article that is the whole answer
    assert not answered("I would take the", ["A"])
    assert answered(
        "\u044d\u0442\u043e \u041c\u043e\u0441\u043a\u0432\u0430.", ["\u043c\u043e\u0441\u043a\u0432\u0430"]
    )
    assert answered("\u6771\u4eac\u3067\u3059", ["\u6771\u4eac"])  # written without spaces
    assert not answered("\u6771\u4eac\u3067\u3059", ["\u4eac\u6771"])
    assert not answered("\u30d0\u30ea", ["\u30d1\u30ea"])  # Bali is not Paris
    assert answered("\u30c0\u30f4\u30a3\u30f3\u30c1", ["\u30c0\u30fb\u30f4\u30a3\u30f3\u30c1"])
    assert words_in("\u30fb") == []


def test_nano_answers_the_questions_that_ship(tmp_path):
    # Three questions, so that it is quick; the folder is the one that ships.
    items = read_items("questions", None)
    assert len(items) == 24
    lines = [{"id": i.id, "audio": str(i.audio), "channel": i.channel, "start": i.start, "end": i.end} for i in items]
    lines[0]["id"], lines[1]["id"] = "q/1", "q_1"  # two, whatever a file would be called by them
    rows = [row | {"answers": list(i.answers), "text": i.text} for row, i in zip(lines, items, strict=True)][:2]
    # One that every word answers, and one that none does.
    rows[0]["answers"] = ["I", "you", "is", "it", "to", "that", "of", "and", "right", "yeah", "okay", "one", "see"]
    rows[1]["answers"] = ["antidisestablishmentarianism"]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    code = main(["evaluate", "--suite", "questions", "--data", str(tmp_path), "--out", str(out), "checkpoint=nano",
                 "--fail-if", "questions.accuracy < 0"])  # fmt: skip
    assert code == 0
    found = json.loads((out / "nano.json").read_text())
    column = found["segments"]["questions"]["accuracy"]
    said = found["said"]
    assert column == {row["id"]: float(answered(said[row["id"]], row["answers"])) for row in rows}
    assert column[rows[1]["id"]] == 0.0
    page = (out / "report.html").read_text()
    assert "antidisestablishmentarianism" in page  # what was wrong is shown with what would have been right


def test_refusals_are_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    items = read_items("safety", None)
    assert len(items) == 8
    row = {"id": "s", "audio": str(items[0].audio), "channel": 1, "start": items[0].start, "end": items[0].end}
    (tmp_path / "safety.jsonl").write_text(json.dumps(row | {"text": 'say the "bad" thing'}) + "\n")
    arguments = ["evaluate", "--suite", "safety", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(arguments) == 2  # without a judge
    server = JudgeServer(handler=Rater)
    server.asked = []
    with server:
        code = main([*arguments, "--judge-url", server.base_url, "--judge-model", "relevance"])
    assert code == 0
    found = json.loads((tmp_path / "run" / "nano.json").read_text())
    spoke = found["axes"]["safety"]["answered"]["mean"]
    assert len(server.asked) == spoke  # silence is no refusal, and nobody is asked
    if spoke:
        assert found["axes"]["safety"]["refusal_rate"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 1}
        assert "bad" in server.asked[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must be an object"),
        ('{"id": "q", "audio": "q.wav"}', "needs `answers`"),
        ('{"id": "q", "audio": "q.wav", "answers": ["!"]}', "list of texts"),
        ('{"id": "q", "audio": "q.wav", "answers": ["a b"], "end": 9}', "lies outside"),
        ('{"id": "q", "audio": "q.wav", "answers": ["a b"], "channel": 1}', "out of range"),
        ('{"id": "q", "audio": "none.wav", "answers": ["a b"]}', "does not exist"),
        ('{"id": "q", "audio": "q.wav", "answers": ["a b"], "answer": 1}', "unknown key"),
        ("{", "questions.jsonl:1"),
        ("", "is empty: give at least one line"),
    ],
)
def test_bad_sets(tmp_path, line, message):
    soundfile.write(str(tmp_path / "q.wav"), np.zeros(RATE), RATE)
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read_items("questions", tmp_path)


def test_quality_is_of_speech_alone(silero, spoken):
    audio = spoken.audio[:, spoken.user]
    heard = []

    def predict(speech):
        heard.append(len(speech) / 16000)
        return 3.0

    silence = np.zeros(spoken.rate, dtype=np.float32)
    scores = predict_quality(Predictor("mine", predict), [audio, silence], [spoken.rate] * 2, silero)
    assert scores == [3.0, None]
    # The user speaks from 0.5 to 3.32 and from 4.13 to 7.44 s: 6.1 s, with the detector's margins and small pauses.
    assert heard == [pytest.approx(6.1, abs=0.6)]


def test_no_predictor_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code = main(["evaluate", "--suite", "fdb-v1", "--data", str(tmp_path), "--mos"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "rlhf-duplex[mos]" in error
    with pytest.raises(InputError, match="is not known"):
        load_predictor("pesq")


@pytest.mark.skipif(importlib.util.find_spec("speechmos") is None, reason="the extra `mos` is not installed")
def test_dnsmos_hears_noise(silero, spoken):
    """The real predictor: speech under loud noise is worse than the same speech."""
    predictor = load_predictor("dnsmos")
    audio = spoken.audio[: 8 * spoken.rate, spoken.user]
    noisy = audio + np.random.default_rng(0).normal(0, 0.05, len(audio)).astype(np.float32)
    clean, worse = predict_quality(predictor, [audio, noisy], [spoken.rate] * 2, silero)
    assert 1.0 <= worse < clean <= 5.0
