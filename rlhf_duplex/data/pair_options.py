"""What can be chosen about pairs: one dataclass that is the command line's options as well.

Imports nothing heavy, so that `--help` answers at once.
"""

from dataclasses import dataclass

from rlhf_duplex.options import check_options, flag, option


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made. Its group is the source that alone reads an option; `converse` takes some, without groups."""

    seed: int = option(0, "of everything random")
    device: str = option("cpu", "cpu, cuda, cuda:1...")
    dtype: str = option("float32", "of the policy's weights", choices=("float32", "bfloat16"))
    heldout: float = option(
        0.1, "share of the dialogues whose pairs are held out", below=1, must="be a share of at least 0 and below 1"
    )
    balance: bool = option(False, "cut every kind to as many pairs as the rarest has")
    context: float = option(30.0, "seconds of dialogue kept before a problem", group="conversations")
    gap: float = option(0.24, "seconds of silence between the user's end and a moved reply", group="conversations")
    response: float = option(3.0, "a turn with no reply for so many seconds is a problem", group="conversations")
    accept: float = option(
        1.5, "a drawn reply must begin within so many seconds of its turn's end", group="conversations"
    )
    reply: float = option(8.0, "seconds of room for a drawn reply, from its turn's end", group="conversations")
    candidates: int = option(
        4, "replies drawn for an unanswered turn; the best is taken", group="conversations", at_least=1
    )
    content_at_most: int = option(
        2,
        "a content mark of the judge (1 to 5) so low is a problem",
        group="conversations",
        at_least=1,
        at_most=5,
        must="be a mark from 1 to 5",
    )
    max_pairs: int = option(2, "pairs of one dialogue", group="conversations", at_least=1)
    strict: bool = option(False, "a bad recording ends the run instead of being skipped", group="conversations")
    group_size: int = option(8, "episodes of a segment", group="rollouts", at_least=2)
    segment_pairs: int = option(
        1,
        "most pairs of a segment: best against worst, second best against second worst...",
        group="rollouts",
        at_least=1,
    )
    margin: float = option(0.5, "least difference of reward between chosen and rejected", group="rollouts")
    lead_in: float = option(1.0, "seconds of silence before a segment", group="rollouts")
    batch_size: int = option(64, "dialogues at once", at_least=1)
    text_temperature: float = option(0.7, "of the policy")
    audio_temperature: float = option(0.8, "of the policy")
    audio_top_k: int = option(250, "of the policy; 0 draws from all codes")

    def __post_init__(self) -> None:
        from envs.errors import InputError  # `envs` imports torch

        check_options(self, flag)
        if not 0 < self.accept <= self.response:
            raise InputError(
                f"--accept must be above 0 and at most --response ({self.response}), found {self.accept}: a reply that "
                "comes later than that is no answer"
            )
        if self.reply <= self.accept:
            raise InputError(f"--reply must be above --accept ({self.accept}), found {self.reply}")
