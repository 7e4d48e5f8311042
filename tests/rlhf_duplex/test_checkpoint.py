"""Which checkpoints are kept."""

import json

from rlhf_duplex.checkpoint import best_checkpoint, last_checkpoint, mark_best, prune


def make(run_dir, update):
    folder = run_dir / "checkpoints" / f"step_{update:06d}"
    folder.mkdir(parents=True)
    return folder


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for update, value, best in ((2, 0.5, True), (4, 0.75, True), (6, 0.25, False), (8, 0.75, False), (10, 0.5, False)):
        assert mark_best(tmp_path, make(tmp_path, update), "reward/total", value) is best
        prune(tmp_path, 2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_000004", "step_000008", "step_000010"]
    assert best_checkpoint(tmp_path).name == "step_000004"
    assert (tmp_path / "checkpoints" / "best").resolve() == best_checkpoint(tmp_path).resolve()
    assert last_checkpoint(tmp_path).name == "step_000010"


def test_another_metric_or_a_lost_folder_begins_anew(tmp_path):
    assert mark_best(tmp_path, make(tmp_path, 2), "reward/total", 5.0)
    assert mark_best(tmp_path, make(tmp_path, 4), "-kl", -0.1)
    best_checkpoint(tmp_path).rmdir()
    assert best_checkpoint(tmp_path) is None
    assert mark_best(tmp_path, make(tmp_path, 6), "-kl", -9.0)


def test_what_a_kill_left_half_written_goes(tmp_path):
    make(tmp_path, 2)
    (tmp_path / "checkpoints" / ".step_000004.123").mkdir()
    (tmp_path / "checkpoints" / "..step_000004.123.123").mkdir()  # of the bundle inside it
    prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


def test_the_link_to_the_best_is_mended_after_a_kill_between_record_and_link(tmp_path):
    folders = [tmp_path / "checkpoints" / f"step_{step:06d}" for step in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
    mark_best(tmp_path, folders[0], "reward/total", 1.0)
    record = tmp_path / "checkpoints" / "best.json"
    record.write_text(json.dumps({"step": "step_000002", "metric": "reward/total", "value": 2.0}))
    prune(tmp_path, keep=1)
    assert (tmp_path / "checkpoints" / "best").resolve() == folders[1].resolve()
