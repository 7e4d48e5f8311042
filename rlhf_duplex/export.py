"""`rlhf-duplex export`: what a run learned as a folder, or a LoRA file, that Moshi's own server reads.

`moshi.server` looks for Mimi's sizes through `mimi_config_name` of config.json alone, and takes a local file there only
as `file://` and a path: that path is written out whole, so an exported folder is to be exported again, not moved.
"""

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from envs.errors import InputError
from envs.files import replacing, write_text
from rlhf_duplex.policy.bundle import NANO, check_bundle, find_bundle, load_bundle, local_info, weights_digest
from rlhf_duplex.policy.lora import LORA_NAME, export_moshi_lora
from rlhf_duplex.policy.personaplex import fuse_projections, is_personaplex

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_bundle(checkpoint: str, to: Path, dtype: str | None = None) -> Path:
    """Write a checkpoint as a bundle that `moshi.server` loads, adapters merged; the folder appears whole.

    Args:
        checkpoint: a run folder (its last checkpoint), a checkpoint, or any bundle.
        to: a folder that does not exist yet, or is empty.
        dtype: of the language model's weights on disk; None keeps what they have. The server computes in bfloat16.

    Returns:
        The folder.

    Raises:
        InputError: no such checkpoint, a damaged one, or a folder that holds something.
    """
    to = _free(to)
    source = _folder(checkpoint)
    bundle = load_bundle(str(source), "cpu", _stored_dtype(source))
    weights = bundle.lm.state_dict()
    if is_personaplex(bundle.config):
        weights = fuse_projections(weights)
    with _written_whole(to) as temporary:
        bundle.save(temporary, DTYPES[dtype] if dtype else None, weights)
        _name_mimi_config(temporary, to)
        check_bundle(local_info(temporary))
    return to


def export_lora(checkpoint: str, to: Path) -> tuple[Path, str]:
    """Write the adapters of a run for `moshi.server --lora-weight`; the folder appears whole.

    Args:
        checkpoint: a run folder whose `lora.rank` is not 0, or a checkpoint in one.
        to: a folder that does not exist yet, or is empty.

    Returns:
        The folder, and the checkpoint that the adapters belong on: a folder's whole path, or a hub id.

    Raises:
        InputError: the run trained no adapters, a file of it is missing or damaged, what it began from is not there any
            more or has changed since, or a PersonaPlex, whose weights Moshi's server does not expand.
    """
    to = _free(to)
    source = _folder(checkpoint).resolve()
    path = source / LORA_NAME
    if not path.is_file():
        raise InputError(f"{source} has no {LORA_NAME}: the run trained no adapters, export it without --lora")
    try:
        run = _run_config(source)
        rank, scaling, base = int(run.lora.rank), float(run.lora.scaling), _base(source, str(run.checkpoint))
        weights = load_file(str(path))
        info = local_info(source)
        check_bundle(info)
    except InputError:
        raise
    except (OmegaConfBaseException, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} cannot be exported ({' '.join(str(error).split())})") from error
    lm = info.get_moshi(device="meta", load_weight=False)
    config = info.raw_config or {}
    if is_personaplex(config):
        raise InputError("Moshi's server expands no PersonaPlex for adapters: export it without --lora, merged")
    with _written_whole(to) as temporary:
        export_moshi_lora(weights, lm, config, rank, scaling, temporary)
        if "mimi_config_name" in config:
            name = Path(config["mimi_config_name"]).name
            shutil.copyfile(source / name, temporary / name)
            _name_mimi_config(temporary, to)
    return to, base


def server_command(
    base: str, config: Path, lora: Path | None = None, device: str = "cuda", beside: Path | None = None
) -> str:
    """The command line that serves a bundle.

    Args:
        base: a bundle's folder, `nano`, or a hub id.
        config: config.json to serve with.
        lora: adapters to put on it.
        beside: of a hub id the bundle that has Mimi and the tokenizer by the names of `config`.
        device: to serve on. Moshi's server itself needs a GPU: see `rlhf_duplex.moshi_server`.
    """
    module = "moshi.server" if device.startswith("cuda") else "rlhf_duplex.moshi_server"
    arguments: list[str | Path] = ["python", "-m", module]
    folder = find_bundle(base)
    if folder is None:
        arguments += ["--hf-repo", base]
        if beside is not None:
            info = local_info(beside)
            arguments += ["--mimi-weight", info.mimi_weights, "--tokenizer", info.tokenizer]
    else:
        info = local_info(folder)
        arguments += ["--moshi-weight", info.moshi_weights, "--mimi-weight", info.mimi_weights]
        arguments += ["--tokenizer", info.tokenizer]
    arguments += ["--config-path", config]
    if lora is not None:
        arguments += ["--lora-weight", lora]
    return shlex.join(map(str, [*arguments, "--static", "none", "--device", device]))


def run(checkpoint: str, to: Path, lora: bool = False, dtype: str | None = None) -> list[str]:
    """Export, and say what was written where and how it is served: the lines to print.

    Raises:
        InputError: see `export_bundle` and `export_lora`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if lora:
        folder, base = export_lora(checkpoint, to)
        beside = _folder(checkpoint).resolve()
        command = server_command(base, folder / "config.json", folder / LORA_NAME, device, beside)
        return [f"serve it: {command}", f"wrote {folder / LORA_NAME} (adapters, on {base})"]
    folder = export_bundle(checkpoint, to, dtype)
    config = json.loads((folder / "config.json").read_text())
    if is_personaplex(config):  # which stock Moshi would serve without the user's voice
        weights = [("--moshi-weight", config["moshi_name"]), ("--mimi-weight", config["mimi_name"])]
        files = [("--tokenizer", config["tokenizer_name"]), *weights]
        how = "with PersonaPlex's own moshi.server: " + shlex.join(
            ["python", "-m", "moshi.server", *(str(part) for key, name in files for part in (key, folder / name))]
        )
    else:
        how = server_command(str(folder), folder / "config.json", None, device)
    return [f"serve it: {how}", f"wrote {folder}"]


@contextmanager
def _written_whole(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its name once everything is in it."""
    try:
        with replacing(to) as temporary:
            yield temporary
            _free(to)  # still: what came to lie there meanwhile is not replaced
    except OSError as error:
        raise InputError(f"{to} cannot be written ({error}): choose another with --to") from error


def _free(folder: Path) -> Path:
    folder = Path(folder).resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--to {folder} is not empty: choose a folder that does not exist yet")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--to {folder} is a file: choose a folder that does not exist yet")
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise InputError(f"--to {folder} cannot be written ({error.strerror}): choose another") from error
    return folder


def _folder(checkpoint: str) -> Path:
    folder = find_bundle(checkpoint)
    if folder is None:
        raise InputError(f"'{checkpoint}' is no folder here: give a run folder, a checkpoint or a bundle")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no checkpoint and is no bundle: train it first, or give another folder")
    return folder


def _stored_dtype(folder: Path) -> torch.dtype:
    """What the language model's weights have on disk, so that loading changes no bit of them."""
    info = local_info(folder)
    check_bundle(info)
    with safe_open(str(info.moshi_weights), framework="pt") as file:
        return file.get_tensor("text_linear.weight").dtype


def _base(checkpoint: Path, base: str) -> str:
    """What the run of a checkpoint began from, by a path that holds anywhere; as it was then."""
    note = checkpoint.parent.parent / "provenance.json"
    then = json.loads(note.read_text())["sha256"]["checkpoint"] if note.is_file() else None
    try:
        now, folder = weights_digest(base), find_bundle(base)
    except InputError as error:
        raise InputError(f"the adapters belong on {base}, which is not here ({error})") from error
    if then and not now:
        raise InputError(f"the adapters belong on the folder {base}, which is not here: export where the run was made")
    if then and now != then:
        raise InputError(
            f"the adapters belong on {base} as it was when {checkpoint.parent.parent} began, and it has gone on since: "
            "put the old one back, or export without --lora"
        )
    return base if folder is None or base == NANO else str(folder.resolve())


def _run_config(checkpoint: Path) -> Any:
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise InputError(f"{path} is missing: adapters are exported from a run folder, which says their rank and base")
    return OmegaConf.load(path)


def _name_mimi_config(folder: Path, place: Path) -> None:
    """Let config.json of `folder` name its Mimi's sizes by a path that the server takes for a local file."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "mimi_config_name" in config:
        config["mimi_config_name"] = f"file://{place / Path(config['mimi_config_name']).name}"
        write_text(path, json.dumps(config, indent=2) + "\n")
