"""Pairs of nano's own conversations: every pair is opened, decoded and held against the audio."""

import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pair_judge import REWRITE, PairJudge
from pair_runs import pairs_command, write_some

from envs.audio import read_audio
from envs.segments import read_manifest, write_manifest
from envs.speech import Interval
from rlhf_duplex.cli import main
from rlhf_duplex.data.conversation import read_corpus, read_words
from rlhf_duplex.data.pair import read_pairs, shard_folder, stream_format
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.inputs import NANO_DATA
from rlhf_duplex.pairs import _batches
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.report.pairs import pair_episodes

ROOT = Path(__file__).parents[2]
# Nano answers late rather than never: a turn counts as unanswered after a second.
RESPONSE = 1.0
TIMING = ("--response", str(RESPONSE), "--accept", str(RESPONSE), "--candidates", "8", "--reply", "3")
TIMING += ("--max-pairs", "3", "--text-temperature", "1")
LEAD_IN = 1.04  # a second, in whole frames
HEARD = 0.25  # seconds by which speech detected in decoded audio may differ
SOFT = 0.4  # the same at a soft beginning ("let")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_some(tmp_path_factory.mktemp("segments"), pause_handling=4, turn_taking=5, backchannel=3)


@pytest.fixture(scope="module")
def logs(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    assert main(["converse", str(manifest), "--out", str(folder), "--text-temperature", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def judge():
    server = PairJudge()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(logs, judge, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        options = ("--judge-url", judge.url, "--judge-model", "replies", "--heldout", "0.25")
        assert pairs_command(logs, out, *TIMING, *options) == 0
    return out


@pytest.fixture(scope="module")
def streams(nano):
    return Streams(nano)


@pytest.fixture(scope="module")
def opened(made, nano, streams, silero):
    """Every pair with both sides decoded."""
    pairs = read_pairs(made, stream_format(nano))
    return [(pair, *pair_episodes(pair, streams, silero)) for pair in pairs]


def of_kind(opened, kind):
    found = [entry for entry in opened if entry[0].kind == kind]
    assert found, f"no pair of kind {kind}"
    return found


def spoken_words(streams, pair, side):
    """The agent's words of one side, in seconds of the recording."""
    columns = torch.cat([pair.context, getattr(pair, side)], dim=1)
    heard = [streams.aligner.pad] * streams.max_delay + columns[0].tolist()
    start = pair.provenance["start"]
    return [(w.text, round(w.start + start, 3)) for w in streams.words(heard)]


def test_the_logs_are_what_was_played(logs, manifest, silero):
    entries = read_corpus(logs)
    segments = {s.id: s for s in read_manifest(manifest)}
    assert len(entries) == len(segments)
    words = near = 0
    for entry in entries:
        segment = segments[entry.id.removesuffix("-0")]
        agent, user, _ = read_words(entry.path.with_suffix(".json"), entry.duration)
        words += len(agent)
        rate = soundfile.info(str(entry.path)).samplerate
        assert entry.duration == pytest.approx(LEAD_IN + segment.duration + 4.0, abs=0.1)
        heard = read_audio(entry.path, 1, rate)[round(LEAD_IN * rate) :]
        recorded = read_audio(segment.recording, segment.user_channel, rate, segment.start, segment.end)
        assert np.corrcoef(heard[: len(recorded)], recorded)[0, 1] > 0.99
        # The user's words are as much later as the user's speech.
        assert user[0].start == pytest.approx(segment.transcript[0][1][0] - segment.start + LEAD_IN, abs=1e-3)
        speech = silero.detect([read_audio(entry.path, 0, rate)], rate)[0]
        near += sum(any(i.start - 0.5 <= w.start <= i.end + 0.5 for i in speech) for w in agent)
    assert words > 20
    assert near > 0.7 * words  # a "mm-hm" may be too short for the detector


def test_all_kinds_are_made(opened, made):
    assert {pair.kind for pair, *_ in opened} == {"interruption", "unresponsive", "content"}
    dialogues = Counter(pair.provenance["dialogue"] for pair, *_ in opened)
    assert max(dialogues.values()) <= 3
    split = {}
    for pair, *_ in opened:
        split.setdefault(pair.provenance["dialogue"], set()).add(pair.split)
    assert all(len(sides) == 1 for sides in split.values())
    assert not shard_folder(made).with_name("pairs.parts").exists()


def test_both_sides_begin_in_the_same_way(opened, nano, streams):
    policy = MoshiPolicy(nano.lm)
    agent = slice(0, 1 + streams.codec.agent_codebooks)
    user = slice(1 + streams.codec.agent_codebooks, None)
    for pair, *_ in opened:
        shared = min(pair.chosen.shape[1], pair.rejected.shape[1])
        assert torch.equal(pair.chosen[user, :shared], pair.rejected[user, :shared])
        assert not torch.equal(pair.chosen[agent, 0], pair.rejected[agent, 0])
        whole = torch.cat([pair.context, pair.chosen], dim=1)
        log_probs, _ = policy.evaluate_actions(whole[None])
        assert log_probs.shape == (1, whole.shape[1])
        assert torch.isfinite(log_probs).all()


def test_the_user_is_the_recordings_user(opened, streams, silero):
    """The very codes of the recording's user channel; decoded, the detector hears speech where the user speaks."""
    user = slice(1 + streams.codec.agent_codebooks, None)
    for pair, chosen, _ in opened:
        rate, start = chosen.sample_rate, pair.provenance["start"]
        recorded = read_audio(Path(pair.provenance["recording"]), 1, rate)[round(start * rate) :]
        recorded = recorded[: len(chosen.user_audio)]
        whole = len(recorded) // streams.codec.frame_samples
        codes = streams.codec.encode(torch.from_numpy(recorded[: whole * streams.codec.frame_samples])[None])[0]
        columns = torch.cat([pair.context, pair.chosen], dim=1)[user]
        count = min(whole - 1, columns.shape[1])
        assert (codes[:, 1 : 1 + count] == columns[:, :count]).float().mean() > 0.99, pair.id
        expected = silero.detect([recorded], rate)[0]
        assert expected
        covered = sum(interval.overlap(found) for interval in expected for found in chosen.user_speech)
        assert covered > 0.6 * sum(i.duration for i in expected), (pair.id, expected, chosen.user_speech)


def test_an_interruption_is_the_same_reply_after_the_users_end(opened, streams):
    for pair, chosen, rejected in of_kind(opened, "interruption"):
        facts, rate = pair.provenance, streams.frame_rate
        start, user_end = facts["start"], facts["user_end"]
        before = [i for i in rejected.agent_speech if i.end > facts["reply"][0] - start]
        assert before
        assert before[0].start + start < user_end
        # Where the reply stood nobody speaks; it begins after the user's end. (Where it is heard to begin is taken
        # from decoded audio on both sides: the log's own may begin some tenths earlier or later.)
        begins = before[0].start + facts["moved_by"]
        assert begins + start >= user_end
        assert facts["reply"][0] + facts["moved_by"] >= user_end + 0.2
        silent = Interval(facts["reply"][0] - start + 0.1, begins - 0.1)
        assert sum(silent.overlap(i) for i in chosen.agent_speech) < 0.1, pair.id
        after = [i for i in chosen.agent_speech if i.start >= silent.end - HEARD]
        assert after[0].start == pytest.approx(begins, abs=HEARD)
        # It is the same speech: the very codes, so many frames later, and nearly the same sound.
        frames = round(facts["moved_by"] * rate)
        first = streams.frame_at(facts["reply"][0]) - round(start * rate)
        last = streams.frames_in(facts["reply"][1]) - round(start * rate)
        codes = {
            side: streams.agent_frames(torch.cat([pair.context, getattr(pair, side)], dim=1))
            for side in ("chosen", "rejected")
        }
        assert torch.equal(codes["chosen"][:, first + frames : last + frames], codes["rejected"][:, first:last])
        samples = streams.codec.frame_samples
        moved = chosen.agent_audio[(first + frames) * samples : (last + frames) * samples]
        stood = rejected.agent_audio[first * samples : last * samples]
        assert np.corrcoef(moved, stood)[0, 1] > 0.8, pair.id
        # And its words, as many frames later.
        told = facts["reply_text"].split()
        late, early = (spoken_words(streams, pair, side)[-len(told) :] for side in ("chosen", "rejected"))
        assert [w for w, _ in late] == [w for w, _ in early]
        assert [t for _, t in late] == pytest.approx([t + facts["moved_by"] for _, t in early], abs=1e-3)
        assert late[0][1] >= user_end


def test_words_stand_where_the_log_has_them(opened, streams):
    """The rejected side of every pair has the log's words at the frames of their onsets."""
    for pair, *_ in opened:
        agent, _, _ = read_words(Path(pair.provenance["recording"]).with_suffix(".json"), 1e9)
        rate = streams.frame_rate
        expected = {(w.text, round(streams.frame_at(w.start) / rate, 3)) for w in agent if w.end > w.start}
        found = spoken_words(streams, pair, "rejected")
        assert set(found) <= expected
        end = pair.provenance["start"] + (pair.context.shape[1] + pair.rejected.shape[1]) / rate
        assert len(found) >= 0.8 * sum(pair.provenance["start"] <= t < end - 0.2 for _, t in expected)


def test_an_unanswered_turn_gets_the_policys_own_reply(opened, streams):
    for pair, chosen, rejected in of_kind(opened, "unresponsive"):
        facts = pair.provenance
        turn_end = facts["user_end"] - facts["start"]
        # What begins as the time runs out is the late answer itself.
        assert not [i for i in rejected.agent_speech if i.end > turn_end and i.start < turn_end + RESPONSE - HEARD]
        assert rejected.duration == pytest.approx(turn_end + RESPONSE, abs=0.2)
        reply = [i for i in chosen.agent_speech if i.end > turn_end]
        assert 0 <= reply[0].start - turn_end <= RESPONSE + HEARD
        assert chosen.agent_speech[-1].end - reply[0].start > 1.0
        assert max(s for s in facts["scores"] if s is not None) == pytest.approx(-facts["latency"])
        # Up to the turn's end it is the log; from there on nothing is missing of what was drawn.
        assert pair.context.shape[1] + streams.max_delay >= streams.frame_at(turn_end) - 1
        assert (pair.chosen >= 0).all()
        assert streams.codec.decode_text(pair.chosen[0].tolist()) == facts["reply_text"]


def test_a_reply_without_any_context(logs, opened, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for suffix in (".wav", ".json"):
        shutil.copy(logs / f"{of_kind(opened, 'unresponsive')[0][0].provenance['dialogue']}{suffix}", folder)
    code = pairs_command(folder, tmp_path / "pairs.jsonl", *TIMING, "--context", "0", "--page-pairs", "0")
    said = capsys.readouterr()
    assert "problems: unresponsive" in said.out
    # Out of the blue a reply is rarely good; what is drawn was scored either way.
    assert code == 0 or "no drawn reply is good enough" in said.out


def test_an_agent_that_says_nothing_at_all_is_unresponsive(logs, opened, tmp_path, capsys):
    name = of_kind(opened, "unresponsive")[0][0].provenance["dialogue"]
    audio, rate = soundfile.read(logs / f"{name}.wav")
    audio[:, 0] = 0.0
    folder = tmp_path / "corpus"
    folder.mkdir()
    soundfile.write(folder / "mute.wav", audio, rate)
    (folder / "mute.json").write_text('{"alignments": []}')
    out = tmp_path / "pairs.jsonl"
    assert pairs_command(folder, out, *TIMING, "--strict", "--page-pairs", "0") == 0, capsys.readouterr()
    assert {pair.kind for pair in read_pairs(out)} == {"unresponsive"}


def test_a_rewrite_is_spoken_in_the_replys_place(opened, streams, judge):
    late, heard, said = [], 0, 0
    for pair, chosen, rejected in of_kind(opened, "content"):
        facts = pair.provenance
        begins = facts["reply"][0] - facts["start"]
        wanted = [w.strip(".") for w in REWRITE.split() if w != "7"]
        found = spoken_words(streams, pair, "chosen")[-len(wanted) :]
        assert [w for w, _ in found] == wanted
        reply = [i for i in chosen.agent_speech if i.end > begins]
        late.append(reply[0].start - begins)
        times = [time - facts["start"] for _, time in found]
        heard += sum(any(i.start - SOFT <= at < i.end for i in reply) for at in times)
        said += len(times)
        assert rejected.text.endswith(facts["reply_text"])
        assert facts["judge"]["scores"] == {k: v for k, v in judge.verdict.items() if isinstance(v, int)}
        assert facts["judge"]["reason"] == judge.verdict["reason"]
    # Now and then nano's codec swallows a first word; a whole sentence it does not.
    assert -HEARD <= min(late) <= max(late) < 2 * SOFT
    assert np.median(late) < SOFT
    assert heard >= 0.9 * said


def test_the_judge_sees_the_dialogue_in_order(judge, made):
    asked = [messages[1]["content"] for messages in judge.asked]
    assert asked
    turns = [json.loads(text.removeprefix("<conversation>").removesuffix("</conversation>")) for text in asked]
    assert all(rows[-1]["role"] == "MODEL" for rows in turns)
    assert any(rows[0]["role"] == "USER" for rows in turns)
    assert all(a["role"] != b["role"] for rows in turns for a, b in itertools.pairwise(rows[:-1]))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = Counter()
        self.sources = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.sources += [value for name, value in attrs if name == "src"]


def test_the_page_shows_and_plays_both_sides(made, opened):
    text = made.with_suffix(".html").read_text()
    page = Page(text)
    shown = sum(min(4, count) for count in Counter(pair.kind for pair, *_ in opened).values())
    assert page.tags["article"] == shown
    assert page.tags["audio"] == 2 * shown
    assert all(source.startswith("data:audio/") for source in page.sources)
    assert "It &lt;b&gt;ignores&lt;/b&gt; the question." in text
    assert page.tags["b"] == 0


@pytest.fixture
def interrupted(opened):
    """The dialogue of an interruption."""
    return of_kind(opened, "interruption")[0][0].provenance["dialogue"]


@pytest.fixture
def corpus(logs, opened, interrupted, tmp_path):
    """Three of the logs in a folder of their own: that dialogue, and two with replies that the judge is asked about."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    asked = dict.fromkeys(pair.provenance["dialogue"] for pair, *_ in of_kind(opened, "content"))
    others = [name for name in asked if name != interrupted][:2]
    assert len(others) == 2
    for name in (interrupted, *others):
        for suffix in (".wav", ".json"):
            shutil.copy(logs / f"{name}{suffix}", folder)
    return folder


def test_a_judge_that_stops_answering_loses_nothing(corpus, judge, tmp_path, capsys):
    """Answers to some questions, then only 503: the pairs so far are kept, and the rest is made later."""
    server = PairJudge(answers=1)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    quick = ("--judge-retries", "0", "--batch-size", "1", "--page-pairs", "0", "--judge-model", "replies")
    try:
        assert pairs_command(corpus, whole, *TIMING, *quick, "--judge-url", judge.url) == 0
        capsys.readouterr()
        assert pairs_command(corpus, out, *TIMING, *quick, "--judge-url", server.url) == 2
        message = capsys.readouterr().err
        assert "the judge did not answer for" in message
        assert "overloaded" in message
        assert "run the same command again to go on" in message
        partly = read_pairs(out)
        assert {p.id for p in partly} < {p.id for p in read_pairs(whole)}
        answered = len(server.asked)
        server.answers = None
        assert pairs_command(corpus, out, *TIMING, *quick, "--judge-url", server.url) == 0
        assert "are done" in capsys.readouterr().out
        assert len(server.asked) > answered
    finally:
        server.shutdown()
        server.server_close()
    assert out.read_text().replace("pairs.shards", "whole.shards") == whole.read_text()
    names = [sorted(p.name for p in shard_folder(path).iterdir()) for path in (out, whole)]
    assert names[0] == names[1]
    assert not out.with_name("pairs.parts").exists()


def test_a_reply_that_the_judge_declines_is_counted_and_holds_up_nothing(corpus, tmp_path, capsys):
    server = PairJudge()
    server.declines = True
    quick = ("--judge-retries", "0", "--page-pairs", "0", "--judge-model", "replies", "--judge-url", server.url)
    try:
        assert pairs_command(corpus, tmp_path / "pairs.jsonl", *TIMING, *quick) == 0
    finally:
        server.shutdown()
        server.server_close()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "replies that the judge refused" in line]
    assert row.split("│")[-2].strip() == "1"


def test_logs_are_not_dropped_from_their_list(logs, manifest, tmp_path, capsys):
    listing = (logs / "conversations.jsonl").read_text()
    assert main(["converse", str(write_some(tmp_path, user_interruption=1)), "--out", str(logs)]) == 2
    assert re.search(r"lists \d+ dialogues that this command does not write", capsys.readouterr().err)
    assert main(["pairs", "--from", "rollouts", str(manifest), "--out", str(manifest)]) == 2  # nor a manifest replaced
    assert "segments.jsonl is there and is not a file of pairs" in capsys.readouterr().err
    assert (logs / "conversations.jsonl").read_text() == listing
    assert len(read_manifest(manifest)) == 12


def test_a_log_has_the_words_that_were_heard_and_says_whose_they_are(tmp_path):
    (segment, *others) = read_manifest(NANO_DATA / "heldout" / "segments.jsonl")[:3]
    words = (("before", (segment.start - 0.3, segment.start - 0.1), "user"), *segment.transcript)
    words += (("after", (segment.end + 9, segment.end + 9.2), "user"),)
    write_manifest(tmp_path / "segments.jsonl", [replace(segment, transcript=words), *others])
    assert main(["converse", str(tmp_path / "segments.jsonl"), "--out", str(tmp_path), "--samples", "2"]) == 0
    entries = read_corpus(tmp_path)  # a manifest beside them is no list of recordings
    said = [w.text for w in read_words(entries[0].path.with_suffix(".json"), entries[0].duration)[1]]
    assert said == [text for text, _, who in segment.transcript if who == "user"]
    assert [entry.source for entry in entries] == [str(s.recording.resolve()) for s in (segment, *others) for _ in "12"]
    out = tmp_path / "made" / "pairs.jsonl"
    assert pairs_command(tmp_path, out, *TIMING, "--heldout", "0.4", "--page-pairs", "0") == 0
    source = {entry.id: entry.source for entry in entries}
    sides = {(source[pair.provenance["dialogue"]], pair.split) for pair in read_pairs(out)}
    assert len(sides) == len({name for name, _ in sides}) > 1  # each user on one side


def test_what_is_in_memory_at_once_does_not_grow_with_the_recordings():
    seconds = [600.0, 600.0, 700.0, 100.0, 4000.0, 10.0, 10.0, 10.0]
    assert list(_batches(range(8), 3, seconds)) == [[0, 1], [2, 3], [4], [5, 6, 7]]
    assert list(_batches([1, 4, 7], 2, None)) == [[1, 4], [7]]
    assert list(_batches([], 2, seconds)) == []


def test_a_judge_that_is_not_there(logs, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert pairs_command(logs, out, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m") == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert pairs_command(logs, out, "--judge-url", "http://127.0.0.1:9/v1") == 2
    assert "needs both --judge-url and --judge-model" in capsys.readouterr().err
    assert not out.exists()


def test_a_bad_recording_is_skipped_or_with_strict_ends_the_run(corpus, interrupted, tmp_path, capsys):
    bad = next(path for path in sorted(corpus.glob("*.wav")) if path.stem != interrupted)
    audio, rate = soundfile.read(bad)
    soundfile.write(bad, audio[:, 0], rate)
    for suffix in (".wav", ".json"):  # the same dialogue under another name
        shutil.copy(corpus / f"{interrupted}{suffix}", corpus / f"copy{suffix}")
    out = tmp_path / "pairs.jsonl"
    assert pairs_command(corpus, out, *TIMING, "--page-pairs", "0") == 0
    printed = capsys.readouterr().out
    assert f"skipped {bad.stem}: recording {bad} has 1 channel(s)" in printed
    assert "duplicate" in printed
    assert len({p.provenance["dialogue"] for p in read_pairs(out)} & {"copy", interrupted}) == 1
    assert not out.with_suffix(".html").exists()
    before = out.read_bytes()
    assert pairs_command(corpus, out, *TIMING, "--strict", "--seed", "1") == 2
    assert "has 1 channel(s)" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_nothing_to_make_pairs_of(corpus, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    for path in corpus.glob("*.json"):
        path.unlink()
    assert pairs_command(corpus, out) == 2
    message = capsys.readouterr().err
    assert "no pair could be made of 3 dialogues (3 could not be read; the first: transcript" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--candidates", "0"), "--candidates must be at least 1, found 0"),
        (("--gap", "-1"), "--gap must be a number of at least 0, found -1"),
        (("--from", "rollouts", "--judge-url", "http://x/v1"), "are of --from conversations"),
        (("--accept", "4"), r"--accept must be above 0 and at most --response (3.0), found 4.0"),
        (("--heldout", "1"), "--heldout must be a share of at least 0 and below 1"),
        (("--content-at-most", "6"), "--content-at-most must be a mark from 1 to 5"),
        (("--out", "pairs.json"), "--out must end in .jsonl"),
        (("--page-pairs", "-1"), "--page-pairs must be at least 0"),
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("--judge-url", "http://x/v1", "--judge-model", "m", "--synthesiser", "none"), "judge: "),
    ],
)
def test_wrong_options(logs, tmp_path, capsys, more, message):
    assert pairs_command(logs, tmp_path / "pairs.jsonl", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()
