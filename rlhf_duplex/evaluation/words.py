"""Whether what the agent says are still words: RL on timing alone can wear a model's language down."""

import itertools
from collections.abc import Iterable

from envs.episode import Episode
from envs.segments import Segment
from rewards.repetition import repeated_share, words_of

REPEATED_NGRAM = 4


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
    repeated = repeated_share(words, REPEATED_NGRAM)
    if repeated is not None:
        found["repeated_4grams"] = repeated
    return found
