"""Repetition: does the agent say the same words again and again?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from envs.episode import Episode
from envs.errors import InputError
from rewards.axis import RewardAxis, Score, register_axis

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def repeated_share(words: Sequence[str], n: int) -> float | None:
    """The share of n-grams that occurred before in the same words; None where there are fewer than n words."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@register_axis
@dataclass
class Repetition(RewardAxis):
    """Minus the share of the agent's n-grams of words that it has said before in the episode, from -1 to 0.

    Read off the inner monologue of the scored window. Fewer than n words repeat nothing: 0.

    Details: `repeated`, the n-grams that occur more than once, and `words`, how many there are.

    Attributes:
        n: words of an n-gram (four, as in the study of degenerate text; arXiv 1908.04319).
    """

    n: int = 4

    name = "repetition"

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InputError(f"reward axis '{self.name}': `n` must be a whole number of at least 1, found {self.n!r}")

    def score_episode(self, episode: Episode) -> Score:
        scored = [word.text for word in episode.words if word.start >= episode.scored_from - 1e-6]
        words = words_of(" ".join(scored) if episode.words else episode.text)
        grams = [" ".join(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        repeated = sorted({gram for gram in grams if grams.count(gram) > 1})
        return Score(0.0 - (repeated_share(words, self.n) or 0.0), {"repeated": repeated, "words": len(words)})
