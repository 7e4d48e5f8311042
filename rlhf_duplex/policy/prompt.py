"""What a policy is told before every dialogue, as PersonaPlex is: voice, silence, role in words, silence.

The columns precede the episode and are none of its frames: nothing of them is scored or trained on. Order and codes
are those of `LMGen.step_system_prompts` in NVIDIA's repository `personaplex`; the user's stream carries a tone.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from envs.audio import audio_info, read_audio
from envs.errors import InputError
from envs.frames import frame_at, frames_in
from rlhf_duplex.config import PromptConfig
from rlhf_duplex.policy.bundle import Bundle

# Of Moshi's own Mimi: a tone of 440 Hz, and silence.
_TONE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
_SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
_TAG = "<system>"


def check_prompt(config: PromptConfig) -> None:
    """Hold a prompt against what can be, with no model loaded.

    Raises:
        InputError: the first that is wrong.
    """
    if config.voice is not None:
        try:
            audio_info(Path(config.voice))
        except InputError as error:
            raise InputError(f"prompt.voice {config.voice} is no recording of a voice ({error})") from error
    if not (config.silence_seconds >= 0 and math.isfinite(config.silence_seconds)):
        raise InputError(f"prompt.silence_seconds must be at least 0, found {config.silence_seconds}")


def make_prompt(bundle: Bundle, config: PromptConfig) -> torch.Tensor | None:
    """Columns `(K, P)` as in `rlhf_duplex.policy.moshi.Trajectory`; None where neither voice nor text is given.

    Args:
        bundle: whose codec, tokenizer and sizes are used.
        config: what to say. The voice is taken as loud as it is recorded (PersonaPlex's own tools bring it to
            -24 LUFS).

    Raises:
        InputError: a recording that cannot be read, or a frame of codes that the model does not have.
    """
    if config.voice is None and not config.text:
        return None
    codec, padding = bundle.codec, bundle.lm.text_padding_token_id
    silent = _frame(bundle, config.silent_frame, "prompt.silent_frame", _SILENCE, np.zeros)
    tone = _frame(bundle, config.user_frame, "prompt.user_frame", _TONE, lambda n: _tone(n, codec.sample_rate))
    voice = torch.zeros(codec.agent_codebooks, 0, dtype=torch.long)
    if config.voice is not None:
        audio = read_audio(Path(config.voice), 0, codec.sample_rate, channels=1)
        whole = np.zeros(-(-len(audio) // codec.frame_samples) * codec.frame_samples, dtype=np.float32)
        whole[: len(audio)] = audio
        voice = codec.encode(torch.from_numpy(whole)[None])[0, : codec.agent_codebooks].cpu()
    words = _words(config.text)
    spoken = torch.tensor(bundle.tokenizer.encode(words) if words else [], dtype=torch.long)
    pause = frame_at(config.silence_seconds, codec.frame_rate)
    text = torch.full((voice.shape[1] + 2 * pause + len(spoken),), padding)
    text[voice.shape[1] + pause : len(text) - pause] = spoken
    agent = torch.cat([voice, silent[:, None].expand(-1, len(text) - voice.shape[1])], dim=1)
    return torch.cat([text[None], agent, tone[: codec.user_codebooks, None].expand(-1, len(text))])


def _words(text: str | None) -> str:
    """Between the tags that PersonaPlex was trained with, where they are not there already."""
    text = (text or "").strip()
    if not text or (text.startswith(_TAG) and text.endswith(_TAG)):
        return text
    return f"{_TAG} {text} {_TAG}"


def _tone(count: int, sample_rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440.0 * np.arange(count) / sample_rate)


def _frame(
    bundle: Bundle, given: list[int] | None, key: str, moshis: tuple[int, ...], sound: Callable[[int], np.ndarray]
) -> torch.Tensor:
    """Codes `(codebooks,)` of a frame that lasts: as configured, of Moshi's Mimi, or by this one's encoder."""
    codec = bundle.codec
    if given is not None:
        if len(given) != codec.agent_codebooks or not all(0 <= code < codec.audio_cardinality for code in given):
            raise InputError(
                f"{key} must be {codec.agent_codebooks} codes from 0 to {codec.audio_cardinality - 1}, found {given}"
            )
        return torch.tensor(given)
    if bundle.mimi_config is None and codec.agent_codebooks == len(moshis):
        return torch.tensor(moshis)
    second = frames_in(1.0, codec.frame_rate) * codec.frame_samples  # the encoder has settled by then
    audio = torch.from_numpy(np.asarray(sound(second), dtype=np.float32))
    return codec.encode(audio[None])[0, : codec.agent_codebooks, -1].cpu()
