"""Whether what the agent says are still words: RL on timing alone can wear a model's language down."""

import itertools
import re
from collections.abc import Iterable, Sequence

from envs.episode import Episode
from envs.segments import Segment

REPEATED_NGRAM = 4
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def spoken_vocabulary(segments: Iterable[Segment]) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """The words that the recorded agent says, and the pairs of words that it says one after the other.

    Both are empty where the segments have no transcripts.
    """
    words: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    for segment in segments:
        said = words_of(
            " ".join(str(entry[0]) for entry in segment.transcript if len(entry) == 3 and entry[2] == "agent")
        )
        words.update(said)
        pairs.update(itertools.pairwise(said))
    return frozenset(words), frozenset(pairs)


def repeated_share(words: Sequence[str], n: int = REPEATED_NGRAM) -> float | None:
    """The share of n-grams that occurred before in the same words; None where there are fewer than n words."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def word_metrics(episode: Episode, vocabulary: frozenset[str], pairs: frozenset[tuple[str, str]]) -> dict[str, float]:
    """Of the agent's inner monologue in one episode; what cannot be said of it is absent.

    Returns:
        `known`: share of its words that the recorded agents say; `known_pairs`: share of its neighbouring words that
        are neighbours in their sentences too; `repeated_4grams`: share of 4-grams that it says more than once.
    """
    words = words_of(episode.text)
    following = list(itertools.pairwise(words))
    found: dict[str, float] = {}
    if words and vocabulary:
        found["known"] = sum(word in vocabulary for word in words) / len(words)
    if following and pairs:
        found["known_pairs"] = sum(pair in pairs for pair in following) / len(following)
    repeated = repeated_share(words)
    if repeated is not None:
        found["repeated_4grams"] = repeated
    return found
