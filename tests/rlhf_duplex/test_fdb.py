"""The benchmark's folders: 50 samples a task of known timings, the official samples, a policy, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rater import Rater

from envs.audio import resample
from envs.errors import InputError
from experiments.judge.server import JudgeServer
from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.full_duplex_bench.leaderboard import PUBLISHED, leaderboard
from rlhf_duplex.evaluation.full_duplex_bench.samples import read_benchmark

SHARED = Path(__file__).parents[3] / "shared" / "data" / "full_duplex_bench"
COUNT = 50
RATE = 16000


def write_output(folder, audio, rate, words):
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(folder / "input.wav"), np.zeros(len(audio)), rate)
    soundfile.write(str(folder / "output.wav"), audio, rate)
    chunks = [{"text": f" {text}", "timestamp": [start, end]} for text, start, end in words]
    record = {"text": " ".join(text for text, *_ in words), "chunks": chunks}
    (folder / "output.json").write_text(json.dumps(record))


def annotate(folder, name, **fields):
    (folder / name).write_text(json.dumps([fields]))


def spoken_words(start, count, step=0.3):
    return [("word", start + step * i, start + step * (i + 1)) for i in range(count)]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, nano_segments):
    """The benchmark in the official layout, and what it must be scored to."""
    root = tmp_path_factory.mktemp("fdb") / "v1_0"
    silence = np.zeros(RATE // 4, dtype=np.float32)
    truth = {}
    for index in range(COUNT):
        # Takes over in every third sample of the synthetic pauses, in every second one of Candor's.
        for task, every in (("synthetic_pause_handling", 3), ("candor_pause_handling", 2)):
            folder = root / task / str(index + 1)
            write_output(folder, silence, RATE, spoken_words(1.0, 6 if index % every == 0 else 2))
            annotate(folder, "pause.json", text="[PAUSE]", timestamp=[1.0, 2.0])
        # Turn-taking: 0.02 s slower from sample to sample; the last ten do not answer.
        folder = root / "candor_turn_taking" / str(index + 1)
        write_output(folder, silence, RATE, spoken_words(2.0 + 0.02 * index, 5) if index < COUNT - 10 else [])
        annotate(folder, "turn_taking.json", text="[TURN-TAKING]", timestamp=[2.0, 2.3])
        # Interruption: the words before its end are of the turn that was interrupted.
        folder = root / "synthetic_user_interruption" / str(index + 1)
        answer = spoken_words(6.5 + 0.01 * index, 5) if index % 5 else spoken_words(6.5, 1)
        write_output(folder, silence, RATE, spoken_words(1.0, 8) + answer)
        annotate(folder, "interrupt.json", context="how are you", interrupt="what about it", timestamp=[5.0, 6.0])
    truth["pause_handling_synthetic"] = {"takeover_rate": 17 / 50}
    truth["pause_handling_candor"] = {"takeover_rate": 25 / 50}
    truth["turn_taking"] = {"takeover_rate": 40 / 50, "latency": 0.02 * np.mean(np.arange(40))}
    answered = [0.5 + 0.01 * i for i in range(COUNT) if i % 5]
    truth["user_interruption"] = {"takeover_rate": 40 / 50, "latency": np.mean(answered)}
    human = {}
    for index in range(COUNT):
        write_backchannel(root / "icc_backchannel" / str(index), index, nano_segments)
        human[str(index)] = [1.0 + (i % 7) for i in range(20 + index)]
    (root / "icc_gt_distribution.json").write_text(json.dumps(human))
    # By index modulo 5, see `write_backchannel`: takeovers and backchannels in 8 s.
    truth["backchannel"] = {"takeover_rate": (0 + 0 + 1 + 1 + 1) / 5, "frequency": (0 + 2 + 1 + 2 + 1) / 5 / 8}
    return root, truth


def write_backchannel(folder, index, segments):
    """0: silence; 1: two short intervals; 2: one of 4 words; 3: of 2 s, then a short one; 4: long, then short."""
    segment = next(s for s in segments if s.id == "heldout-0050")
    speech = resample(segment.user_audio(24000), 24000, RATE)  # starts with "they", 0.25 s

    def burst(seconds):
        return speech[: round(seconds * RATE)]

    placed = [[], [(1.0, 0.5), (5.0, 0.5)], [(3.0, 0.6)], [(1.0, 2.0), (6.0, 0.5)], [(0.5, 3.35), (6.5, 0.5)]][
        index % 5
    ]
    audio = np.zeros(8 * RATE, dtype=np.float32)
    words = []
    for start, seconds in placed:
        part = burst(seconds)
        audio[round(start * RATE) : round(start * RATE) + len(part)] = part
        count = 4 if index % 5 == 2 else 1
        words += [("word", start + 0.1 + 0.05 * i, start + 0.12 + 0.05 * i) for i in range(count)]
    write_output(folder, audio, RATE, words)


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_synthetic_benchmark_is_scored_to_the_known_answer(synthetic, tmp_path, capsys):
    root, truth = synthetic
    out = tmp_path / "run"
    assert evaluate("--suite", "fdb-v1", "--data", root, "--outputs", f"made={root}", "--out", out) == 0
    found = result(out, "made")
    assert found["samples"] == 5 * COUNT
    assert found["lead_in_seconds"] is None
    for axis, metrics in truth.items():
        for metric, value in metrics.items():
            estimate = found["axes"][axis][metric]
            assert estimate["mean"] == pytest.approx(value, abs=1e-9), (axis, metric)
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    assert found["axes"]["turn_taking"]["latency"]["n"] == 40
    assert found["axes"]["backchannel"]["jsd"]["n"] == COUNT
    # The official script: the last short interval alone (3 becomes none), and nothing after the long one (4).
    official = found["official"]["axes"]["backchannel"]
    assert official["takeover_rate"]["mean"] == pytest.approx((0 + 0 + 1 + 0 + 1) / 5)
    assert official["frequency"]["mean"] == pytest.approx((0 + 2 + 1 + 2 + 0) / 5 / 8)
    for axis in truth:
        if axis != "backchannel":  # corrected values differ nowhere else
            assert found["official"]["axes"][axis] == found["axes"][axis]
    assert "made" in (out / "leaderboard.md").read_text()
    assert "Full-Duplex-Bench v1" in capsys.readouterr().out


def test_divergence_equals_the_official_formula(synthetic, tmp_path):
    """`eval_backchannel.py` written out again, with Silero's own package, on what both score."""
    import torch
    from scipy.interpolate import interp1d
    from scipy.spatial.distance import jensenshannon
    from silero_vad import get_speech_timestamps, load_silero_vad

    root, _ = synthetic
    evaluate(
        "--suite", "fdb-v1", "--data", root, "--outputs", f"made={root}", "--out", tmp_path / "run", "compatible=true"
    )
    found = result(tmp_path / "run", "made")
    assert found["compatible"] is True
    assert "corrected" in found
    model = load_silero_vad()
    human = json.loads((root / "icc_gt_distribution.json").read_text())
    for index in range(5):
        audio, _ = soundfile.read(str(root / "icc_backchannel" / str(index) / "output.wav"), dtype="float32")
        stamps = get_speech_timestamps(torch.from_numpy(audio), model, return_seconds=True)
        short = []
        for stamp in stamps:
            if stamp["end"] - stamp["start"] > 3:
                break
            short.append(stamp)
        expected = 1.0
        if short:
            counts = [0] * (int(8.0 / 0.2) + 1)
            for stamp in short:
                for bin_index in range(int(stamp["start"] / 0.2), int(stamp["end"] / 0.2) + 1):
                    counts[bin_index] += 1
            ours = (np.array(counts) + 1e-10) / np.sum(np.array(counts) + 1e-10)
            curve = interp1d(np.linspace(0, 1, len(human[str(index)])), human[str(index)])
            expected = jensenshannon(ours, curve(np.linspace(0, 1, len(counts))))
        jsd = found["segments"]["backchannel"]["jsd"][f"icc_backchannel/{index}"]
        assert jsd == pytest.approx(expected, abs=1e-9)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark's own samples are not shipped (CC-BY-NC)")
def test_official_samples(tmp_path):
    out = tmp_path / "run"
    assert evaluate("--suite", "fdb-v1", "--data", SHARED, "--outputs", SHARED, "--out", out, "compatible=true") == 0
    found = result(out, "full_duplex_bench")
    # Pause: 12 words over 4.68 s. Turn-taking: "Yes," at 3.36 s, the turn ends at 2.01 s.
    assert found["axes"]["pause_handling"]["takeover_rate"]["mean"] == 1.0
    assert found["axes"]["turn_taking"]["takeover_rate"]["mean"] == 1.0
    assert found["axes"]["turn_taking"]["latency"]["mean"] == pytest.approx(3.36 - 2.0100000000000016)
    assert found["corrected"]["axes"] == found["axes"]
    assert found["official_script"]["turn_taking"] == {"takeover_rate": 1.0, "latency": pytest.approx(1.35)}


def make_small(root, spoken):
    """Two samples of three tasks with nano's user to be played to a policy."""
    audio = spoken.audio[: int(3.5 * spoken.rate), spoken.user]
    for task, name, fields in (
        ("candor_pause_handling", "pause.json", {"text": "[PAUSE]", "timestamp": [3.0, 3.3]}),
        ("candor_turn_taking", "turn_taking.json", {"text": "[TURN-TAKING]", "timestamp": [3.3, 3.4]}),
        ("icc_backchannel", None, {}),
    ):
        folder = root / task / "1"
        folder.mkdir(parents=True)
        soundfile.write(str(folder / "input.wav"), audio, spoken.rate)
        if name:
            annotate(folder, name, **fields)
    return len(audio) / spoken.rate


def test_a_policy_plays_and_is_compared(tmp_path, spoken, capsys):
    seconds = make_small(tmp_path / "data", spoken)
    out = tmp_path / "run"
    arguments = ("--suite", "fdb-v1", "--data", tmp_path / "data", "--out", out, "context.lead_in=0.4")
    gate = ("--fail-if", "turn_taking.takeover_rate < 0", "--fail-if", "backchannel.frequency > 100")
    assert evaluate(*arguments, "--checkpoint", "base=nano", "--checkpoint", "again=nano", *gate) == 0
    found = result(out, "base")
    assert found["lead_in_seconds"] == 0.4
    assert found["transcripts"] == "inner monologue"
    assert found["segments"] == result(out, "again")["segments"]  # the same draws for every checkpoint
    folder = out / "outputs" / "base" / "candor_turn_taking" / "1"
    info = soundfile.info(str(folder / "output.wav"))
    assert info.frames / info.samplerate == pytest.approx(seconds, abs=1e-4)
    chunks = json.loads((folder / "output.json").read_text())["chunks"]
    assert all(0 <= c["timestamp"][0] <= c["timestamp"][1] <= seconds for c in chunks)
    page = (out / "report.html").read_text()
    assert "base (lead-in 0.4 s)" in page
    assert "PersonaPlex + RL (Fisher)" in page
    # What was written can be scored again as anybody's outputs, to the same figures.
    again = tmp_path / "again"
    assert evaluate(*arguments[:4], "--outputs", f"base={out / 'outputs' / 'base'}", "--out", again) == 0
    assert result(again, "base")["segments"] == found["segments"]
    capsys.readouterr()
    assert evaluate(*arguments[:4], "--outputs", f"b={out / 'outputs' / 'base'}", "--out", again, "--fail-if",
                    "turn_taking.takeover_rate >= 0") == 3  # fmt: skip
    assert "b fails: turn_taking.takeover_rate >= 0" in capsys.readouterr().err
    assert (tmp_path / "again.old-1" / "base.json").is_file()  # what was there is kept


@pytest.fixture
def rater(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = JudgeServer(handler=Rater)
    server.asked = []
    with server:
        yield server


def test_interruptions_are_rated_by_the_judge(synthetic, tmp_path, rater):
    root, _ = synthetic
    judge = ("--judge-url", rater.base_url, "--judge-model", "relevance")
    evaluate("--suite", "fdb-v1", "--data", root, "--outputs", f"made={root}", "--out", tmp_path / "run", *judge)
    found = result(tmp_path / "run", "made")
    assert found["axes"]["user_interruption"]["rating"]["mean"] == 4.0
    assert found["axes"]["user_interruption"]["rating"]["n"] == 40  # where the turn was taken
    assert all("what about it" in text for text in rater.asked)


def test_overlap_scenarios(tmp_path, spoken, rater):
    """v1.5: the agent speaks over the user from 1 to 3 s; the clean input leaves it alone."""
    root, outputs = tmp_path / "v1_5", tmp_path / "outputs"
    user = resample(spoken.audio[:, spoken.user], spoken.rate, RATE)[: 8 * RATE]  # 0.5-3.32 and 4.13-7.44 s
    agent = np.zeros_like(user)
    agent[: 2 * RATE] = user[round(0.5 * RATE) : round(2.5 * RATE)]  # speech from 0 to 2 s
    for scenario in ("user_interruption", "background_speech"):
        folder = root / scenario / "1"
        folder.mkdir(parents=True)
        metadata = {"context_text": "hello there", "current_turn_text": "one moment", "timestamps": [0.5, 3.3]}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        soundfile.write(str(folder / "input.wav"), user, RATE)
        soundfile.write(str(folder / "clean_input.wav"), np.zeros_like(user), RATE)
        said = [("yes", 0.2, 0.4), ("sure", 1.0, 1.4)] if scenario == "user_interruption" else []
        for name in ("output", "clean_output"):
            target = outputs / scenario / "1"
            target.mkdir(parents=True, exist_ok=True)
            soundfile.write(str(target / f"{name}.wav"), agent, RATE)
            chunks = [{"text": text, "timestamp": [start, end]} for text, start, end in said]
            (target / f"{name}.json").write_text(json.dumps({"text": "", "chunks": chunks}))
    out = tmp_path / "run"
    judge = ("--judge-url", rater.base_url, "--judge-model", "relevance")
    assert evaluate("--suite", "fdb-v1.5", "--data", root, "--outputs", f"x={outputs}", "--out", out, *judge) == 0
    axes = result(out, "x")["axes"]
    # The user speaks from 0.5 s on, the agent until 2 s: 1.5 s of overlap, and nothing after it.
    assert axes["user_interruption"]["stop_latency"]["mean"] == pytest.approx(1.5, abs=0.15)
    assert "response_latency" not in axes["user_interruption"]
    assert "clean_stop_latency" not in axes["user_interruption"]
    # 0..3: the highest but one is 2, `uncertain`; who says nothing is `unknown` and nobody is asked.
    assert axes["user_interruption"]["uncertain"]["mean"] == 1.0
    assert axes["background_speech"]["unknown"]["mean"] == 1.0
    assert len(rater.asked) == 1
    assert '"one moment"' in rater.asked[0]


def test_leaderboard_has_the_published_rows():
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 7}
    ours = {"axes": {"turn_taking": {"latency": estimate}}, "lead_in_seconds": 3.0}
    rows = leaderboard({"mine": ours})
    assert [row.name for row in rows] == [*PUBLISHED, "mine (lead-in 3 s)"]
    assert rows[0].cells == ("0.445", "0.528", "0.255", "0.074", "0.824", "0.739", "0.162", "0.920", "3.440", "1.377")
    assert rows[-1].cells[6] == "0.500 [0.400, 0.600] n 7"
    assert set(rows[-1].cells) == {"-", "0.500 [0.400, 0.600] n 7"}
    plain = leaderboard({"mine": {"axes": {"pause_handling": {"takeover_rate": estimate}}}})
    assert plain[0].cells[0] == "-"
    assert len(plain[0].cells) == 11


def broken(root, change):
    folder = root / "candor_turn_taking" / "1"
    write_output(folder, np.zeros(RATE // 4), RATE, spoken_words(1.0, 2))
    annotate(folder, "turn_taking.json", text="[TURN-TAKING]", timestamp=[2.0, 2.3])
    change(folder)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "turn_taking.json").unlink(), "turn_taking.json cannot be read"),
        (lambda f: (f / "turn_taking.json").write_text("[]"), "no annotation of turn_taking"),
        (lambda f: (f / "turn_taking.json").write_text('[{"timestamp": [1, "x"]}]'), "must be"),
        (lambda f: (f / "turn_taking.json").write_text('[{"timestamp": [1, Infinity]}]'), "must be"),
        (lambda f: (f / "output.json").write_text("{}"), "is no transcript"),
        (lambda f: (f / "output.json").unlink(), "--asr MODEL"),
        (lambda f: (f / "output.wav").unlink(), "output.wav is missing"),
        (lambda f: (f / "output.wav").write_bytes(b"RIFF"), "output.wav cannot be read as audio"),
        (
            lambda f: (f / "output.json").write_text('{"chunks": [{"text": "a", "timestamp": [NaN, 1.0]}]}'),
            "a word's times are [nan, 1.0]",
        ),
        (lambda f: (f / "input.wav").write_bytes(b"RIFF"), "cannot be read as audio"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, change, message):
    root = broken(tmp_path / "data", change)
    code = evaluate("--suite", "fdb-v1", "--data", root, "--outputs", f"x={root}", "--out", tmp_path / "run")
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("run/*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "fdb-v1"), "needs --data"),
        (("--suite", "fdb-v1", "--data", "nowhere"), "does not exist"),
        (("--suite", "fdb-v1", "--data", "."), "holds no sample"),
        (("--suite", "fdb-v1.5", "--data", ".", "compatible=true"), "is of --suite fdb-v1"),
        (("--suite", "fdb-v1", "compatible=maybe"), "compatible=true or compatible=false"),
        (("--suite", "fdb-v1", "--judge-url", "http://localhost:1/v1"), "needs --judge-url and --judge-model"),
        (("--suite", "fdb-v1", "--data", ".", "--checkpoint", "a=nano", "--checkpoint", "a=nano"), "two systems"),
        (("--suite", "fdb-v1", "--data", ".", "--outputs", "nowhere"), "--outputs nowhere does not exist"),
        (("--data", "."), "not of heldout; heldout takes checkpoint="),
        (("--suite", "live", "--outputs", "."), "--outputs is of --suite fdb-v1 and fdb-v1.5, not of live"),
        (("--fail-if", "latency"), "is no condition"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_nothing_of_others_is_moved(tmp_path, capsys):
    root = broken(tmp_path / "data", lambda folder: None)
    arguments = ("--suite", "fdb-v1", "--data", root, "--outputs", f"x={root}", "--out")
    assert evaluate(*arguments, tmp_path) == 2
    assert "lies in the run folder" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.json").write_text("{}")
    assert evaluate(*arguments, tmp_path / "mine") == 2
    assert "something else than an evaluation" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mine"]


def test_samples_are_in_the_order_of_their_numbers(synthetic):
    root, _ = synthetic
    samples = [s for s in read_benchmark(root, "fdb-v1") if s.task == "backchannel"]
    assert [s.id for s in samples] == [str(i) for i in range(COUNT)]
    with pytest.raises(InputError, match="holds no sample"):
        read_benchmark(root, "fdb-v1.5")
