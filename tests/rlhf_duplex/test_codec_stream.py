"""Mimi frame by frame against Mimi on the whole audio."""

import numpy as np
import torch

from rlhf_duplex.policy.codec_stream import MimiStream


def test_frame_by_frame_is_as_in_one_piece(nano, nano_segments):
    codec = nano.codec
    size = codec.frame_samples
    audio = torch.from_numpy(np.stack([s.user_audio(codec.sample_rate)[: 30 * size] for s in nano_segments[:2]]))
    whole = codec.encode(audio)
    stream = MimiStream(codec)
    for batch in (2, 1):  # and once more: a stream begins anew
        stream.begin(batch)
        frames = [stream.encode(audio[:batch, i * size : (i + 1) * size]) for i in range(30)]
        codes = torch.stack(frames, dim=-1)
        assert codes.shape == (batch, codec.user_codebooks, 30)
        # A code may flip where two are equally near; one in a thousand would be a fault.
        assert (codes == whole[:batch]).float().mean() > 0.999
        stream.begin(batch)
        heard = torch.cat([stream.decode(whole[:batch, : codec.agent_codebooks, i]) for i in range(30)], dim=1)
        assert torch.allclose(heard, codec.decode(whole[:batch, : codec.agent_codebooks]), atol=1e-4)
    # The codec itself was never put into streaming mode.
    assert torch.equal(codec.encode(audio), whole)
