"""What a run learned, served: by stock LMGen token for token, and by the real server over its websocket."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import sphn
import torch
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.export import export_bundle, export_lora, server_command
from rlhf_duplex.export import run as run_export
from rlhf_duplex.policy.bundle import NANO_FOLDER, load_bundle, weights_digest
from rlhf_duplex.policy.lora import LORA_NAME, adapter_weights, add_lora, merged_weights
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling

GREEDY = Sampling(text_temperature=0.0, audio_temperature=0.0)


def as_the_server_loads(folder, lora=None, base=None, dtype=torch.float32):
    """Moshi's own loader with the arguments of its server, and nothing more."""
    config = json.loads((folder / "config.json").read_text())
    weights = base or folder
    info = CheckpointInfo.from_hf_repo(
        "owner/none",
        str(weights / config["moshi_name"]),
        str(weights / config["mimi_name"]),
        str(weights / config["tokenizer_name"]),
        lora_weights=None if lora is None else str(lora),
        config_path=str(folder / "config.json"),
    )
    return info, info.get_moshi(device="cpu", dtype=dtype, fuse_lora=True)


def greedy_of_stock(lm, user):
    """Stock LMGen's answers `(1 + agent_codebooks, T)`."""
    generator = LMGen(lm, use_sampling=False)
    with torch.no_grad(), generator.streaming(1):
        answers = [generator.step(user[:, :, t : t + 1]) for t in range(user.shape[-1])]
    lm.set_streaming_detached(False)
    return torch.cat([answer[0] for answer in answers if answer is not None], dim=-1)


def greedy_of_ours(lm, user):
    policy = MoshiPolicy(lm, GREEDY)
    policy.begin([0], user.shape[-1])
    actions = torch.stack([policy.act(user[:, :, t])[0] for t in range(user.shape[-1])], dim=-1)
    policy.end()
    return actions[:, policy.max_delay :]


@pytest.fixture(scope="module")
def user_audio(one_of_each):
    """A recorded user of a held-out segment between a second and four of silence, as nano was trained to hear one."""
    segment = next(s for s in one_of_each if s.axis == "turn_taking")
    rate = load_bundle("nano").codec.sample_rate
    spoken = segment.user_audio(rate)[: round((segment.events["user_turn_end"] - segment.start) * rate)]
    silence = np.zeros(rate, dtype=np.float32)
    return np.concatenate([silence, spoken, *[silence] * 4]), rate


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    """A run folder whose last checkpoint has adapters that do something, as `save_checkpoint` lays it out."""
    run = tmp_path_factory.mktemp("runs") / "adapted"
    bundle = load_bundle("nano")
    add_lora(bundle.lm, 4, 2.0, "peft", seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in bundle.lm.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    folder = run / "checkpoints" / "step_000003"
    bundle.save(folder, weights=merged_weights(bundle.lm))
    save_file(adapter_weights(bundle.lm.state_dict()), str(folder / LORA_NAME))
    (run / "config.yaml").write_text("checkpoint: nano\nlora: {rank: 4, scaling: 2.0, flavour: peft}\n")
    return run, bundle


def codes_of(bundle, user_audio):
    return bundle.codec.encode(torch.from_numpy(user_audio[0])[None])[:, :, :50]


def test_greedy_tokens_of_the_exported_model_in_stock_lmgen_are_ours(adapted_run, user_audio, tmp_path, capsys):
    run, trained = adapted_run
    assert main(["export", str(run), "--to", str(tmp_path / "served")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"wrote {tmp_path / 'served'}"
    info, served = as_the_server_loads(tmp_path / "served")
    user = codes_of(trained, user_audio)
    expected = greedy_of_ours(trained.lm, user)
    assert torch.equal(greedy_of_stock(served, user), expected)
    assert len(expected.unique()) > 20  # it does not stay silent
    assert not torch.equal(greedy_of_stock(load_bundle("nano").lm, user), expected)
    # And it is a bundle again, Mimi of nano's size and all.
    again = load_bundle(str(tmp_path / "served"))
    assert torch.equal(greedy_of_ours(again.lm, user), expected)
    assert info.get_mimi().frame_size == trained.codec.frame_samples


def test_lora_file_on_its_base_is_the_merged_model(adapted_run, user_audio, tmp_path):
    run, trained = adapted_run
    folder, base = export_lora(str(run), tmp_path / "adapters")
    assert base == "nano"
    assert {path.name for path in folder.iterdir()} == {LORA_NAME, "config.json", "mimi_config.json"}
    _, served = as_the_server_loads(folder, folder / LORA_NAME, NANO_FOLDER)
    user = codes_of(trained, user_audio)
    assert torch.equal(greedy_of_stock(served, user), greedy_of_ours(trained.lm, user))


def test_adapters_of_a_hub_model_are_served_with_files_that_are_there(adapted_run, tmp_path, monkeypatch):
    run, _ = adapted_run
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("checkpoint: kyutai/moshiko\nlora: {rank: 4, scaling: 2.0}\n")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    line, _ = run_export(next(Path().glob("step_*")).name, tmp_path / "out", lora=True)
    words = line.split()
    assert words[words.index("--hf-repo") + 1] == "kyutai/moshiko"
    for flag in ("--mimi-weight", "--tokenizer", "--config-path", "--lora-weight"):
        assert Path(words[words.index(flag) + 1]).is_absolute()
        assert Path(words[words.index(flag) + 1]).is_file()


def test_adapters_go_on_what_they_were_trained_on(adapted_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whose folder `runs` is not there
    run, _ = adapted_run
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(NANO_FOLDER, tmp_path / "base")
    config, note = tmp_path / "run" / "config.yaml", tmp_path / "run" / "provenance.json"
    config.write_text(f"checkpoint: {tmp_path}/base\nlora: {{rank: 4, scaling: 2.0}}\n")
    note.write_text(json.dumps({"sha256": {"checkpoint": weights_digest(str(tmp_path / "base"))}}))
    assert export_lora(str(tmp_path / "run"), tmp_path / "a")[1] == str(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(InputError, match=r"as it was when .*run began, and it has gone on since"):
        export_lora(str(tmp_path / "run"), tmp_path / "b")
    config.write_text("checkpoint: runs/gone\nlora: {rank: 4, scaling: 2.0}\n")
    with pytest.raises(InputError, match="belong on the folder runs/gone, which is not here"):
        export_lora(str(tmp_path / "run"), tmp_path / "b")
    config.write_text(f"checkpoint: {tmp_path}/gone\nlora: {{rank: 4, scaling: 2.0}}\n")
    with pytest.raises(InputError, match="gone, which is not here"):
        export_lora(str(tmp_path / "run"), tmp_path / "b")
    step = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    told = json.loads((step / "config.json").read_text())
    schedule = told["depformer_weights_per_step_schedule"] * 2
    (step / "config.json").write_text(
        json.dumps(told | {"dep_q": told["n_q"], "depformer_weights_per_step_schedule": schedule})
    )
    config.write_text("checkpoint: nano\nlora: {rank: 4, scaling: 2.0}\n")
    note.unlink()
    with pytest.raises(InputError, match="PersonaPlex for adapters: export it without --lora"):
        export_lora(str(tmp_path / "run"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_dtype_on_disk_and_bits_kept(tmp_path):
    export_bundle("nano", tmp_path / "as_it_is")
    stored = load_file(tmp_path / "as_it_is" / "model.safetensors")
    original = load_file(NANO_FOLDER / "model.safetensors")
    assert all(
        torch.equal(value, stored[name]) and value.dtype == stored[name].dtype for name, value in original.items()
    )
    export_bundle("nano", tmp_path / "half", "bfloat16")
    assert load_file(tmp_path / "half" / "model.safetensors")["text_linear.weight"].dtype == torch.bfloat16


def test_what_is_wrong_is_one_line_and_nothing_is_written(adapted_run, tmp_path, capsys):
    run, _ = adapted_run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty_run").mkdir()
    wrong = [
        (["export", "nano", "--to", str(tmp_path / "full")], "is not empty"),
        (["export", str(tmp_path / "empty_run"), "--to", str(tmp_path / "out")], "has no checkpoint"),
        (["export", "owner/name", "--to", str(tmp_path / "out")], "no folder here"),
        (["export", "nano", "--lora", "--to", str(tmp_path / "out")], "trained no adapters"),
        (["export", "nano", "--to", str(tmp_path / "full" / "mine.txt")], "is a file"),
        (["export", "nano", "--to", "/proc/nowhere/x"], "cannot be written"),
    ]
    for arguments, message in wrong:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty_run"}
    (run / "config.yaml").rename(run / "away.yaml")
    with pytest.raises(InputError, match="which says their rank"):
        export_lora(str(run), tmp_path / "out")
    (run / "away.yaml").rename(run / "config.yaml")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(port, server, seconds=120):
    """Wait until the server accepts connections."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout.read()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server does not listen")


async def talk(port, audio, rate):
    """Speak to the server as its web page does; gives its text, its audio, and the audio that it heard (of opus)."""
    writer, hears = sphn.OpusStreamWriter(rate), sphn.OpusStreamReader(rate)
    reader = sphn.OpusStreamReader(rate)
    text, heard, answered, sent = [], [], [], 0
    step = rate * 20 // 1000  # a page of opus
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/api/chat", timeout=aiohttp.ClientWSTimeout(ws_close=60)) as socket,
    ):
        assert (await socket.receive(timeout=60)).data == b"\x00"  # the handshake
        for start in range(0, len(audio) - step + 1, step):
            packet = writer.append_pcm(audio[start : start + step])
            if packet:
                heard.append(hears.append_bytes(packet))
                await socket.send_bytes(b"\x01" + packet)
                sent += 1
        frames = sum(map(len, heard)) // (rate * 80 // 1000)
        # The server answers all frames but the first (dropped) and the second (its delay).
        while sum(map(len, answered)) < (frames - 3) * (rate * 80 // 1000):
            message = await socket.receive(timeout=60)
            assert message.type == aiohttp.WSMsgType.BINARY, message
            if message.data[0] == 1:
                pcm = reader.append_bytes(message.data[1:])
                if len(pcm):
                    answered.append(pcm)
            else:
                assert message.data[0] == 2
                text.append(message.data[1:].decode())
    return text, np.concatenate(answered), np.concatenate(heard)


def words_of_stock(folder, heard):
    """What the server answers to this audio, by Moshi's classes in the order in which it calls them: pieces of text."""
    torch.manual_seed(42424242)  # the server's own
    config = json.loads((folder / "config.json").read_text())
    files = [str(folder / config[key]) for key in ("moshi_name", "mimi_name", "tokenizer_name")]
    info = CheckpointInfo.from_hf_repo("owner/none", *files, config_path=str(folder / "config.json"))
    mimi, tokenizer = info.get_mimi("cpu"), info.get_text_tokenizer()
    generator = LMGen(info.get_moshi(device="cpu", dtype=torch.bfloat16, fuse_lora=True), **info.lm_gen_config)
    size, pieces = int(mimi.frame_size), []
    chunks = torch.from_numpy(heard[: len(heard) // size * size]).view(-1, 1, 1, size)
    with torch.no_grad(), mimi.streaming(1), generator.streaming(1):
        for chunk in torch.zeros(4, 1, 1, size):  # it warms up
            generator.step(mimi.encode(chunk))
        mimi.reset_streaming()
        generator.reset_streaming()
        for number, chunk in enumerate(chunks):
            codes = mimi.encode(chunk)
            if number == 0:
                mimi.reset_streaming()
            tokens = generator.step(codes)
            if tokens is not None and tokens[0, 0, 0] not in (0, 3):
                pieces.append(tokenizer.id_to_piece(int(tokens[0, 0, 0])).replace("\N{LOWER ONE EIGHTH BLOCK}", " "))
    return pieces


@pytest.mark.timeout(300)
def test_the_real_server_loads_the_export_and_answers_recorded_speech(user_audio, tmp_path):
    folder = export_bundle("nano", tmp_path / "served")
    config = json.loads((folder / "config.json").read_text())
    assert config["mimi_config_name"] == f"file://{folder}/mimi_config.json"
    port = free_port()
    command = server_command(str(folder), folder / "config.json", None, "cpu").split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, *command[1:], "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        listening(port, server)
        audio, rate = user_audio
        text, answered, heard = asyncio.run(talk(port, audio, rate))
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()
    assert len(answered) > 4 * rate
    assert np.isfinite(answered).all()
    assert np.abs(answered).max() > 0.05  # it speaks
    expected = words_of_stock(folder, heard)
    assert len(text) > 0
    assert text == expected[: len(text)]  # the frames after the last audio that was waited for may be missing
    assert len(expected) - len(text) <= 4
