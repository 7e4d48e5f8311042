"""Pipelines: named stages, each a command, each run again only when something that it depends on has changed.

A configuration with `stages` is a pipeline; a stage is the command line that a person would type::

    run_dir: runs/pipeline
    stages:
      pairs:
        run: pairs nano --from rollouts --checkpoint nano --out ${run_dir}/pairs/pairs.jsonl
        makes: ${run_dir}/pairs/pairs.jsonl
      warmstart:
        run: warmstart configs/nano_dpo_ln.yaml pairs=${run_dir}/pairs/pairs.jsonl run_dir=${run_dir}/warm
        makes: ${run_dir}/warm/evaluation/after.json

What a stage depends on is its command line and the content of every file and folder that it names (but those that it
makes), plus those under `needs`; of a manifest among them, also the recordings that it names. A stamp in
`RUN_DIR/.stages/` holds their hash, and apart from it the recordings' fingerprint, which stamps of earlier versions
lack; a finished stage whose stamp still fits is not run again. One that was interrupted goes on with `resume=true`
where it can.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.data.recordings import files_fingerprint, named_files
from rlhf_duplex.run_folder import keep_old, stops

RESUMED = ("train", "warmstart")  # commands that take resume=true
COMMANDS = ("curate", "pairs", "converse", "warmstart", "train", "evaluate", "ablate", "report", "export")
_OUTPUTS = ("--out", "--to")
_KEYS = ("run", "makes", "needs")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """A step of a pipeline.

    Attributes:
        name: unique.
        arguments: of the command line, the command first.
        makes: files and folders that are there when it is done.
        needs: inputs beside those that its command line names.
    """

    name: str
    arguments: tuple[str, ...]
    makes: tuple[Path, ...]
    needs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """Stages in their order, and the folder that their stamps are in."""

    run_dir: Path
    stages: tuple[Stage, ...]


@dataclass
class Outcome:
    """What became of the stages, by name."""

    ran: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline's YAML file; `key=value` overrides fill its `${key}`.

    Raises:
        InputError: the file or a stage is not what it must be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise InputError(f"pipeline {path} does not exist: give the path of a YAML file with `stages`")
    wrong = [o for o in overrides if "=" not in o or o.startswith("=")]
    if wrong:
        raise InputError(f"argument '{wrong[0]}' is not of the form key=value")
    keys = [override.partition("=")[0] for override in overrides]
    text = path.read_text(encoding="utf-8", errors="replace")
    own = ("run_dir", "stages")
    unused = [key for key in keys if f"${{{key}}}" not in text and key.partition(".")[0] not in own]
    if unused:
        raise InputError(
            f"{path}: no stage uses `{unused[0]}`: write it into the command of a stage, or use ${{{unused[0]}}} there"
        )
    try:
        layer = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        config: Any = OmegaConf.to_container(
            OmegaConf.create(_split(path, OmegaConf.to_container(layer))), resolve=True
        )
    except InputError:
        raise
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # YAML's own errors
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from error
    stages = config.get("stages") if isinstance(config, dict) else None
    if not isinstance(stages, dict) or not stages or not isinstance(config.get("run_dir"), str):
        raise InputError(f"{path} is no pipeline: it needs `run_dir` and `stages`")
    return Pipeline(Path(config["run_dir"]), tuple(_stage(path, str(name), row) for name, row in stages.items()))


def _split(path: Path, raw: Any) -> Any:
    """The file with each `run` as its words, split before `${run_dir}` is filled in: a folder may have spaces."""
    stages = raw.get("stages") if isinstance(raw, dict) else None
    for name, row in stages.items() if isinstance(stages, dict) else ():
        if isinstance(row, dict) and isinstance(row.get("run"), str):
            try:
                row["run"] = shlex.split(row["run"])
            except ValueError as error:
                raise InputError(f"{path}: stage '{name}': `run` cannot be read ({error})") from error
    return raw


def _stage(path: Path, name: str, row: Any) -> Stage:
    where = f"{path}: stage '{name}'"
    if not isinstance(row, dict) or not isinstance(row.get("run"), list):
        raise InputError(f"{where} needs `run`, the command line of the stage")
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise InputError(f"{where}: unknown key `{unknown[0]}`: the keys are {', '.join(_KEYS)}")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"{where}: a name has letters, digits, - and _")
    arguments = tuple(str(word) for word in row["run"])
    if not arguments or arguments[0] not in COMMANDS:
        raise InputError(
            f"{where}: `run` must begin with one of {', '.join(COMMANDS)}, found '{shlex.join(arguments)}'"
        )
    makes = _paths(where, "makes", row.get("makes"))
    if not makes:
        raise InputError(f"{where} needs `makes`, what is there when it is done")
    return Stage(name, arguments, makes, _paths(where, "needs", row.get("needs")))


# What these commands write they do not replace themselves: the option that says where, and a file that tells it.
_KEPT = {"export": ("--to", "config.json"), "converse": ("--out", "conversations.jsonl")}


def _keep_old(pipeline: Pipeline, stage: Stage) -> None:
    """Put aside what a stage that ran before has written, for it to write anew.

    Raises:
        InputError: it cannot be renamed.
    """
    option, mark = _KEPT.get(stage.arguments[0], ("", ""))
    if option not in stage.arguments[:-1]:
        return
    folder = Path(stage.arguments[stage.arguments.index(option) + 1]).resolve()
    within = any(path.resolve().is_relative_to(folder) for path in (pipeline.run_dir, *inputs_of(stage)))
    if (folder / mark).is_file() and not within:
        try:
            keep_old(folder)
        except OSError as error:
            raise InputError(f"stage '{stage.name}': {folder} cannot be renamed ({error})") from error


def _paths(where: str, key: str, value: Any) -> tuple[Path, ...]:
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise InputError(f"{where}: `{key}` must be a path or a list of paths, found {value!r}")
    return tuple(Path(v) for v in values)


def inputs_of(stage: Stage) -> list[Path]:
    """Every file and folder that a stage's command line names (as an argument, or behind `=`), and its `needs`.

    What it makes is no input, nor what follows `--out`, `--to` or `run_dir=`. `nano` stands for the bundle and the
    dialogues that ship.
    """
    named = []
    for before, argument in zip(stage.arguments, stage.arguments[1:], strict=False):
        key, _, value = argument.rpartition("=")
        if before not in _OUTPUTS and key not in ("run_dir", *_OUTPUTS) and not value.startswith("-"):
            named.append(value)
    found = [Path(value) for value in named if value and os.path.exists(value)]  # a text is too long for a Path
    if "nano" in named:
        found += [_PACKAGE / "nano", _PACKAGE / "nano_data"]
    makes = {path.resolve() for path in stage.makes}
    return [*dict.fromkeys([*(path for path in found if path.resolve() not in makes), *stage.needs])]


def stage_hash(stage: Stage) -> str:
    """Of the command line and the content of all inputs. Another way to compute it runs every finished stage again.

    Raises:
        InputError: an input under `needs` is not there.
    """
    digest = hashlib.sha256(json.dumps(stage.arguments).encode())
    for path in inputs_of(stage):
        if not path.exists():
            raise InputError(f"stage '{stage.name}' needs {path}, which does not exist")
        for file in _files(path, {made.resolve() for made in stage.makes}):
            # What ships is known by its place in the package, wherever that is installed.
            shown = path.relative_to(_PACKAGE) if path.is_relative_to(_PACKAGE) else path
            digest.update(f"\0{shown}\0{file.relative_to(path)}\0".encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def recordings_of(stage: Stage) -> str:
    """The fingerprint of the recordings that manifests among the inputs name; nothing where none is there.

    Raises:
        InputError: a recording cannot be read.
    """
    inputs, makes = inputs_of(stage), {path.resolve() for path in stage.makes}
    folders = {path.resolve() for path in inputs} | makes
    listings = (file for path in inputs for file in _files(path, makes) if file.suffix == ".jsonl")
    # What lies in another input is read whole by `stage_hash`. A corpus is not: it is too large for that.
    outside = {
        named: None
        for listing in listings
        for named in named_files(listing)
        if not any(named.resolve().is_relative_to(folder) for folder in folders)
    }
    return files_fingerprint(tuple(outside), times=False) if outside else ""


def _files(path: Path, makes: set[Path]) -> Iterable[Path]:
    """The file itself, or all files of a folder but hidden ones (half-written), pages (which `report` makes anew), and
    what the stage itself makes."""
    if path.is_file():
        return [path]
    inside = (p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix != ".html" and p.resolve() not in makes)
    return [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]


def _stamp(pipeline: Pipeline, stage: Stage) -> Path:
    return pipeline.run_dir / ".stages" / f"{stage.name}.json"


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_stamp(path: Path, key: str, recordings: str, done: bool) -> None:
    write_text(path, json.dumps({"hash": key, "recordings": recordings, "done": done}) + "\n")


def _add_recordings(path: Path, stage: Stage) -> None:
    """To a stamp that says nothing of them; its time, which tells when the stage was started, stays."""
    stamp, since = _read_stamp(path), path.stat()
    if not stamp.get("recordings") and (recordings := recordings_of(stage)):
        write_text(path, json.dumps(stamp | {"recordings": recordings}) + "\n")
        os.utime(path, ns=(since.st_atime_ns, since.st_mtime_ns))


def _fits(stamp: dict[str, Any], key: str, recordings: str) -> bool:
    """Whether a stamp is of these inputs. It may say nothing of recordings, and a corpus may have been taken away."""
    noted = stamp.get("recordings")
    return stamp.get("hash") == key and (not noted or not recordings or noted == recordings)


def is_done(pipeline: Pipeline, stage: Stage) -> bool:
    """Whether it ran to its end on what its inputs are now, and what it made is there."""
    stamp = _read_stamp(_stamp(pipeline, stage))
    return bool(
        stamp.get("done")
        and all(path.exists() for path in stage.makes)
        and _fits(stamp, stage_hash(stage), recordings_of(stage))
    )


def _resumes(arguments: Sequence[str], since: float) -> bool:
    """Whether a run of this command that was started at `since` and interrupted has left anything to go on from."""
    run_dir = next((a.partition("=")[2] for a in arguments if a.startswith("run_dir=")), None)
    steps = Path(run_dir, "checkpoints").glob("step_*") if run_dir else ()
    return arguments[0] in RESUMED and any(step.stat().st_mtime >= since for step in steps)


def run_pipeline(
    pipeline: Pipeline,
    command: Callable[[Sequence[str]], int],
    say: Callable[[str], None] = print,
    dry: bool = False,
) -> Outcome:
    """Run the stages that are not done, in their order.

    Args:
        pipeline: stages.
        command: runs a command line and gives its exit code (`rlhf_duplex.cli.main`).
        say: a line for the user.
        dry: only say what would run. A stage behind one that would run is counted as one that would, too.

    Raises:
        InputError: a stage failed (its own message came before), was stopped, or did not make what it says it makes.
    """
    outcome = Outcome()
    for stage in pipeline.stages:
        line = f"rlhf-duplex {shlex.join(stage.arguments)}"
        if not (dry and outcome.ran) and is_done(pipeline, stage):
            if not dry:
                _add_recordings(_stamp(pipeline, stage), stage)
            outcome.kept.append(stage.name)
            say(f"stage {stage.name}: done before, inputs unchanged")
            continue
        outcome.ran.append(stage.name)
        if dry:
            say(f"stage {stage.name}: would run {line}")
            continue
        path = _stamp(pipeline, stage)
        key, recordings, stamp = stage_hash(stage), recordings_of(stage), _read_stamp(path)
        interrupted = _fits(stamp, key, recordings) and not stamp.get("done")
        resumed = interrupted and _resumes(stage.arguments, path.stat().st_mtime)
        arguments = [*stage.arguments, "resume=true"] if resumed else list(stage.arguments)
        if interrupted:
            _add_recordings(path, stage)
        else:
            _write_stamp(path, key, recordings, done=False)
        say(f"stage {stage.name}: {line}{' resume=true' if resumed else ''}")
        before = len(stops)
        if stamp:
            _keep_old(pipeline, stage)
        code = command(arguments)
        if len(stops) > before:
            raise InputError(f"stage '{stage.name}' was stopped: start the pipeline again; it goes on from here")
        missing = [str(path) for path in stage.makes if not path.exists()]
        if code or missing:
            reason = f"ended with code {code}" if code else f"did not make {missing[0]}"
            raise InputError(
                f"stage '{stage.name}' {reason}: mend it and start the pipeline again; it goes on from here"
            )
        _write_stamp(path, key, recordings, done=True)
    return outcome
