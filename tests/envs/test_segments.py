import json

import pytest

from envs import InputError, read_manifest, write_manifest
from envs.files import check_replaced, file_name


def test_a_manifest_comes_back_as_it_was_written(tmp_path, write_dialogue, write_rows, row):
    write_dialogue()
    words = [["yes", [1.5, 1.8], "user"]]
    segments = read_manifest(write_rows(row(transcript=words), "", row(id="s1", events={})))
    assert [s.id for s in segments] == ["s0", "s1"]
    assert (segments[0].duration, segments[0].agent_channel) == (8.0, 0)
    write_manifest(tmp_path / "deeper" / "copy.jsonl", segments)
    line = json.loads((tmp_path / "deeper" / "copy.jsonl").read_text().splitlines()[0])
    assert line["recording"] == "../dialogue.flac"  # relative to the manifest it stands in
    again = read_manifest(tmp_path / "deeper" / "copy.jsonl")
    assert [(s.id, s.events, s.transcript) for s in again] == [(s.id, s.events, s.transcript) for s in segments]


def test_a_manifest_in_a_linked_folder_finds_its_recordings(tmp_path, write_dialogue, write_rows, row):
    write_dialogue()
    segments = read_manifest(write_rows(row()))
    (tmp_path / "disk" / "deep" / "store").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data").symlink_to(tmp_path / "disk" / "deep" / "store")
    write_manifest(tmp_path / "project" / "data" / "segments.jsonl", segments)
    for path in (tmp_path / "project" / "data", tmp_path / "disk" / "deep" / "store"):
        (segment,) = read_manifest(path / "segments.jsonl")
        assert segment.recording.samefile(segments[0].recording)


def test_what_is_there_is_replaced_by_its_kind_alone(tmp_path, write_rows, row):
    manifest = write_rows(row())
    check_replaced(manifest, "a manifest", {"axis", "recording"})
    check_replaced(tmp_path / "new.jsonl", "a manifest", {"axis", "recording"})
    (tmp_path / "notes.txt").write_text("no JSON\n")
    for path in (manifest, tmp_path / "notes.txt"):
        with pytest.raises(
            InputError, match=f"{path.name} is there and is not a file of pairs, which would replace it"
        ):
            check_replaced(path, "a file of pairs", {"shard"})


def test_a_byte_order_mark_is_no_part_of_the_first_line(write_dialogue, write_rows, row):
    write_dialogue()
    path = write_rows(row())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [segment.id for segment in read_manifest(path)] == ["s0"]


def test_ids_as_file_names_stay_apart_and_in_their_folder():
    assert file_name("d0-turn_1") == "d0-turn_1"
    names = [file_name(identifier) for identifier in ("a/b", "a_b", "a:b", "../a", "..", "x" * 300, "x" * 301)]
    assert len(set(names)) == len(names)
    assert all("/" not in name and "." not in name and len(name) < 120 for name in names)


def test_a_file_for_each_speaker(tmp_path, write_dialogue, write_rows, row):
    write_dialogue("user.flac", channels=1)
    write_dialogue("agent.flac", channels=1, seconds=9.5)
    apart = {"recording": "user.flac", "user_channel": 0, "agent_recording": "agent.flac"}
    (segment,) = read_manifest(write_rows(row(**apart)))
    assert (segment.user_channel, segment.agent_channel) == (0, 0)
    assert len(segment.user_audio(16000)) == len(segment.agent_audio(16000)) == 8 * 16000
    write_manifest(tmp_path / "deeper" / "copy.jsonl", [segment])
    line = json.loads((tmp_path / "deeper" / "copy.jsonl").read_text())
    assert line["agent_recording"] == "../agent.flac"
    for changes, message in [
        ({"end": 9.8}, "lies outside .*agent.flac, which lasts 9.500 s"),
        ({"agent_recording": "gone.flac"}, "gone.flac does not exist"),
        ({"agent_recording": 1}, "`agent_recording` must be a path, found 1"),
        ({"user_channel": 1}, "`user_channel` 1 is out of range"),
    ]:
        with pytest.raises(InputError, match=f"segments.jsonl:1: .*{message}"):
            read_manifest(write_rows(row(**apart | changes)))


WRONG_ROWS = [
    ({"axis": "content"}, "unknown axis 'content': the axes of segments are pause_handling, turn_taking"),
    ({"user_channel": 2}, "`user_channel` 2 is out of range: .* has channels 0 to 1"),
    ({"user_channel": -1}, "`user_channel` must be a channel index from 0, found -1"),
    ({"user_channel": True}, "`user_channel` must be a channel index from 0, found True"),
    ({"start": 5.0, "end": 5.0}, "0 <= start < end, found 5.0 and 5.0"),
    ({"end": 99.0}, "segment 1.0-99.0 s lies outside .*, which lasts 10.000 s"),
    ({"end": float("nan")}, "0 <= start < end"),
    ({"recording": "gone.flac"}, "gone.flac does not exist"),
    ({"recording": "mono.flac"}, "has 1 channel.*, 2 are needed"),
    ({"recording": "corrupt.flac"}, "cannot be read as audio .*corrupt or empty"),
    ({"recording": "empty.flac"}, "cannot be read as audio .*corrupt or empty"),
    ({"id": ""}, "`id` must be a non-empty string"),
    ({"stop": 3.0}, "unknown key `stop`: the keys are id, axis"),
    ({"events": [1]}, "`events` must be an object, found list"),
    ({"events": {"user_turn_end": 9.5}}, "event 'user_turn_end' at 9.5 lies outside the segment 1.0-9.0 s"),
    ({"events": {"user_turn_end": "late"}}, "event 'user_turn_end' must be a time"),
    ({"events": {"user_turn_end": [2.0, 3.0]}}, "event 'user_turn_end' must be a time, found"),
    ({"events": {"true_backchannels": [2.0, 3.0]}}, "event 'true_backchannels' must be a list of intervals"),
    ({"events": {"interruption": [[2.0, 3.0]]}}, r"event 'interruption' must be one interval \[start, end\]"),
    ({"events": {"pauses": [[3.0, 2.0]]}}, "event 'pauses' must be a list of intervals"),
    ({"transcript": "hello"}, "`transcript` must be a list"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_ROWS, ids=[m[:40] for _, m in WRONG_ROWS])
def test_a_wrong_line_is_named_with_its_number(changes, message, tmp_path, write_dialogue, write_rows, row):
    write_dialogue()
    write_dialogue("mono.flac", channels=1)
    (tmp_path / "corrupt.flac").write_bytes(b"no audio at all")
    (tmp_path / "empty.flac").touch()
    path = write_rows(row(id="right"), row(**changes))
    with pytest.raises(InputError, match=f"segments.jsonl:2: .*{message}"):
        read_manifest(path)


def test_lines_that_are_no_segment(write_dialogue, write_rows, row):
    write_dialogue()
    lacking = row()
    del lacking["start"], lacking["axis"]
    for line, message in [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "a segment must be a JSON object, found list"),
        (lacking, "missing `axis`, `start`"),
        (row(), "id 's0' was already used on line 1: ids must be unique"),
    ]:
        with pytest.raises(InputError, match=f"segments.jsonl:2: {message}"):
            read_manifest(write_rows(row(), line))


def test_no_manifest_an_empty_one_and_one_that_is_no_text(tmp_path, write_rows):
    with pytest.raises(InputError, match=r"does not exist: give the path of a segments\.jsonl"):
        read_manifest(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match=r"is a folder: give the path of a segments\.jsonl"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="is empty: give at least one line"):
        read_manifest(write_rows("", "  "))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_manifest(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    "word",
    [["hi", None, "user"], ["hi", [1.0], "user"], ["hi", [0.0, float("nan")], "user"], ["hi", [0, 1], "SPEAKER_MAIN"]],
)
def test_words_without_times_or_with_an_unknown_speaker(write_dialogue, write_rows, row, word):
    write_dialogue()
    with pytest.raises(InputError, match=r"segments.jsonl:1: `transcript` must be a list"):
        read_manifest(write_rows(row(transcript=[word])))


def test_half_a_surrogate_pair_does_not_stop_a_manifest(write_dialogue, write_rows, row, tmp_path):
    write_dialogue()
    [segment] = read_manifest(write_rows(row(transcript=[["h\ud83d", [0.0, 1.0], "user"]])))
    write_manifest(tmp_path / "again.jsonl", [segment])
    assert read_manifest(tmp_path / "again.jsonl")[0].transcript[0][0] == "h?"
    assert not list(tmp_path.glob(".again*"))
