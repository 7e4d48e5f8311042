"""Pipelines: which stages run, which are kept, and what a person is told."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from envs.errors import InputError
from rlhf_duplex import pipeline
from rlhf_duplex.cli import main
from rlhf_duplex.pipeline import Stage, inputs_of, load_pipeline, run_pipeline, stage_hash
from rlhf_duplex.run_folder import stop_requests

PIPELINE = """
run_dir: {folder}/run
length: 2
stages:
  pairs:
    run: pairs {folder}/source.txt --out ${{run_dir}}/pairs.jsonl --count ${{length}}
    makes: ${{run_dir}}/pairs.jsonl
  warmstart:
    run: warmstart pairs=${{run_dir}}/pairs.jsonl run_dir=${{run_dir}}/warm
    makes: ${{run_dir}}/warm/after.json
  report:
    run: report ${{run_dir}}/warm
    makes: ["${{run_dir}}/warm/report.html"]
    needs: {folder}/style.txt
"""


class Commands:
    """Stands for the command line: writes what each stage makes, and remembers what it was given."""

    def __init__(self, folder):
        self.folder, self.calls, self.fail = folder, [], None

    def __call__(self, arguments):
        self.calls.append(list(arguments))
        name, run = arguments[0], self.folder / "run"
        if name == self.fail:
            return 2
        if name == "pairs":
            source = (self.folder / "source.txt").read_text()
            (run / "pairs.jsonl").write_text(source.upper() * int(arguments[-1]))
        elif name == "warmstart":
            (run / "warm").mkdir(exist_ok=True)
            (run / "warm" / "after.json").write_text(json.dumps((run / "pairs.jsonl").read_text()))
        else:
            (run / "warm" / "report.html").write_text((run / "warm" / "after.json").read_text())
        return 0

    def names(self):
        found, self.calls = [call[0] for call in self.calls], []
        return found


@pytest.fixture
def setting(tmp_path):
    (tmp_path / "source.txt").write_text("a")
    (tmp_path / "style.txt").write_text("plain")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.format(folder=tmp_path))
    commands = Commands(tmp_path)

    def start(*overrides, **options):
        pipeline = load_pipeline(tmp_path / "pipeline.yaml", overrides)
        pipeline.run_dir.mkdir(exist_ok=True)
        return run_pipeline(pipeline, commands, lambda line: None, **options)

    return tmp_path, commands, start


def test_a_finished_stage_is_not_run_again(setting):
    _, commands, start = setting
    assert start().ran == ["pairs", "warmstart", "report"]
    assert commands.names() == ["pairs", "warmstart", "report"]
    assert start().kept == ["pairs", "warmstart", "report"]
    assert commands.names() == []


def test_a_change_runs_the_stage_and_what_depends_on_it(setting):
    folder, commands, start = setting
    start()
    commands.names()
    (folder / "source.txt").write_text("b")
    start()
    assert commands.names() == ["pairs", "warmstart", "report"]
    (folder / "style.txt").write_text("fancy")  # `needs` of the last stage
    start()
    assert commands.names() == ["report"]
    (folder / "run" / "pairs.jsonl").write_text("by hand")
    start()
    assert commands.names() == ["warmstart", "report"]
    (folder / "run" / "warm" / "report.html").unlink()
    start()
    assert commands.names() == ["report"]


def test_a_changed_argument_counts_but_an_equal_result_stops_there(setting):
    folder, commands, start = setting
    start()
    commands.names()
    (folder / "source.txt").write_text("aa")
    start("length=1")  # another command on another source with the same result: AA
    assert commands.names() == ["pairs"]


def test_an_override_that_no_stage_uses(setting):
    folder, _, _ = setting
    with pytest.raises(InputError, match=r"no stage uses `trainer\.updates`: write it into the command"):
        load_pipeline(folder / "pipeline.yaml", ["length=1", "trainer.updates=2"])


def test_a_failed_stage_ends_it_and_is_where_it_goes_on(setting):
    _, commands, start = setting
    commands.fail = "warmstart"
    with pytest.raises(InputError, match="stage 'warmstart' ended with code 2"):
        start()
    assert commands.names() == ["pairs", "warmstart"]
    commands.fail = None
    assert start().ran == ["warmstart", "report"]


def test_an_interrupted_training_stage_goes_on(setting):
    folder, commands, start = setting
    commands.fail = "warmstart"
    with pytest.raises(InputError):
        start()
    (folder / "run" / "warm" / "checkpoints" / "step_000002").mkdir(parents=True)
    commands.fail = None
    commands.calls = []
    start()
    assert commands.calls[0][-1] == "resume=true"
    commands.calls = []
    (folder / "source.txt").write_text("b")
    start()
    assert all("resume=true" not in call for call in commands.calls)  # another pairs file: from the start


def test_checkpoints_of_an_earlier_run_are_not_gone_on_from(setting):
    folder, commands, start = setting
    start()
    old = folder / "run" / "warm" / "checkpoints" / "step_000002"
    old.mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    (folder / "source.txt").write_text("b")
    commands.fail = "warmstart"  # before it had moved the old run aside
    with pytest.raises(InputError):
        start()
    commands.fail, commands.calls = None, []
    start()
    assert all("resume=true" not in call for call in commands.calls)


def test_a_stage_that_a_signal_ended_is_not_done(setting):
    folder, commands, start = setting

    def stopped(arguments):
        with stop_requests() as received:
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
        return commands(arguments)  # all files are there, and the exit code is 0

    pipeline = load_pipeline(folder / "pipeline.yaml")
    pipeline.run_dir.mkdir()
    with pytest.raises(InputError, match="stage 'pairs' was stopped: start the pipeline again"):
        run_pipeline(pipeline, stopped, lambda line: None)
    assert start().ran == ["pairs", "warmstart", "report"]


def test_what_export_writes_is_no_input(setting):
    folder, _, _ = setting
    stage = Stage("export", ("export", str(folder), "--to", str(folder / "served")), (folder / "served" / "x",))
    (folder / "served").mkdir()
    assert inputs_of(stage) == [folder]


def test_an_export_is_made_again_and_the_older_one_kept(tmp_path):
    (tmp_path / "pipeline.yaml").write_text(
        f"run_dir: {tmp_path}/run\nstages:\n  served:\n    run: export {tmp_path}/bundle --to ${{run_dir}}/served\n"
        "    makes: ${run_dir}/served/config.json\n"
    )
    (tmp_path / "bundle").mkdir()

    def export(arguments):
        folder = Path(arguments[-1])
        if folder.exists():
            return 2  # as `export` does: it replaces nothing
        shutil.copytree(tmp_path / "bundle", folder)
        return 0

    for text in ("{}", "{ }", "{  }"):
        (tmp_path / "bundle" / "config.json").write_text(text)
        pipeline = load_pipeline(tmp_path / "pipeline.yaml", [])
        pipeline.run_dir.mkdir(exist_ok=True)
        assert run_pipeline(pipeline, export, lambda line: None).ran == ["served"]
        assert (tmp_path / "run" / "served" / "config.json").read_text() == text
    assert (tmp_path / "run" / "served.old-2" / "config.json").read_text() == "{ }"


def test_what_a_stage_did_not_write_is_not_put_aside(tmp_path):
    """A folder that was there before the stage ever ran, one with other things in it, and one with its own input."""
    folder = tmp_path / "there"
    stages = "stages:\n  made:\n    run: {run}\n    makes: ${{run_dir}}/made\n"
    (tmp_path / "bundle").mkdir()

    def refuses(arguments):
        return 2

    for run, name in ((f"export {tmp_path}/bundle --to {folder}", "config.json"),
                      (f"export {folder} --to {folder}", "config.json"),
                      (f"converse nano --out {folder}", "thesis.txt")):  # fmt: skip
        (tmp_path / "pipeline.yaml").write_text(f"run_dir: {tmp_path}/run\n" + stages.format(run=run))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        for _ in range(2 if "thesis" in name or run.count(str(folder)) > 1 else 1):
            pipeline = load_pipeline(tmp_path / "pipeline.yaml", [])
            pipeline.run_dir.mkdir(exist_ok=True)
            with pytest.raises(InputError, match="ended with code 2"):
                run_pipeline(pipeline, refuses, lambda line: None)
        assert (folder / name).is_file()
        (folder / name).unlink()
    assert not list(tmp_path.glob("there.old-*"))


def test_a_long_text_is_no_file():
    role = "prompt.text=" + "You are a wise and friendly teacher. " * 20
    assert inputs_of(Stage("train", ("train", role, "run_dir=x"), (Path("x"),))) == []
    assert stage_hash(Stage("train", ("train", role), ()))


def test_a_stage_that_makes_nothing_is_an_error(setting):
    folder, _, _ = setting
    (folder / "pipeline.yaml").write_text(
        f"run_dir: {folder}/run\nstages:\n  report:\n    run: report {folder}\n    makes: {folder}/nothing.html\n"
    )
    with pytest.raises(InputError, match=r"did not make .*nothing.html"):
        run_pipeline(load_pipeline(folder / "pipeline.yaml"), lambda arguments: 0, lambda line: None)


def test_a_dry_run_runs_nothing_and_counts_what_follows(setting):
    folder, commands, start = setting
    assert start(dry=True).ran == ["pairs", "warmstart", "report"]
    start()
    commands.names()
    (folder / "run" / "pairs.jsonl").unlink()
    outcome = start(dry=True)
    assert (outcome.kept, outcome.ran) == ([], ["pairs", "warmstart", "report"])
    assert commands.names() == []


def test_inputs_are_what_the_command_names_but_not_what_it_makes(setting):
    folder, _, start = setting
    start()
    pairs, warm, report = load_pipeline(folder / "pipeline.yaml").stages
    assert inputs_of(pairs) == [folder / "source.txt"]
    assert inputs_of(warm) == [folder / "run" / "pairs.jsonl"]  # not its own run folder
    assert folder / "style.txt" in inputs_of(report)


def test_the_shipped_pipeline_has_the_stages_of_the_whole_way():
    pipeline = load_pipeline(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    assert [stage.name for stage in pipeline.stages] == ["curate", "pairs", "warmstart", "train", "report"]
    assert [stage.arguments[0] for stage in pipeline.stages] == ["curate", "pairs", "warmstart", "train", "report"]


def test_a_folder_with_spaces_is_one_word(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "run_dir: x\nstages: {a: {run: 'report ${run_dir}/rl --out \"my page.html\"', makes: '${run_dir}/y'}}\n"
    )
    (stage,) = load_pipeline(path, ["run_dir=runs/my first"]).stages
    assert stage.arguments == ("report", "runs/my first/rl", "--out", "my page.html")
    assert stage.makes == (Path("runs/my first/y"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: x\n", "it needs `run_dir` and `stages`"),
        ("stages: {a: {run: report x, makes: y}}\n", "it needs `run_dir` and `stages`"),
        ("run_dir: x\nstages: {a: {makes: y}}\n", "stage 'a' needs `run`"),
        ("run_dir: x\nstages: {a: {run: report x}}\n", "stage 'a' needs `makes`"),
        ("run_dir: x\nstages: {a: {run: rm -r x, makes: y}}\n", "must begin with one of curate, "),
        ("run_dir: x\nstages: {a: {run: report x, makes: y, when: z}}\n", "unknown key `when`"),
        ("run_dir: x\nstages: {a/b: {run: report x, makes: y}}\n", "a name has letters"),
        ("run_dir: x\nstages: {a: {run: 'report ${where}', makes: y}}\n", "where"),
        ('run_dir: x\nstages: {a: {run: "report \'x", makes: y}}\n', "stage 'a': `run` cannot be read"),
        ("run_dir: [\n", "is not valid YAML"),
    ],
)
def test_mistakes(tmp_path, capsys, text, message):
    (tmp_path / "p.yaml").write_text(text)
    assert main(["pipeline", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_ships_is_the_same_wherever_the_package_is(tmp_path, monkeypatch):
    stage = Stage("train", ("train", "checkpoint=nano"), (tmp_path / "made",))
    here = stage_hash(stage)
    for name in ("nano", "nano_data"):
        shutil.copytree(pipeline._PACKAGE / name, tmp_path / "package" / name)
    monkeypatch.setattr(pipeline, "_PACKAGE", tmp_path / "package")
    assert stage_hash(stage) == here
    (tmp_path / "package" / "nano" / "config.json").write_text("{}")
    assert stage_hash(stage) != here
