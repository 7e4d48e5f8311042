"""How relevant are nano's words? A rule in place of a language model, the same verdict for the same words always.

Nano answers in sentences of a closed set (`experiments.nano.sentences`), and the user ends each turn with one of a few
requests. So it can be read off the words alone how much of an answer is phrases of such sentences (three words or more
of one, in order) and whether a sentence suits what was asked for:

- 0: no answer, or fewer than half of its words are in phrases,
- 2: at least 0.8 of them are, and a phrase of four words or more is of a sentence that suits the request,
- 1: anything else.

Backchannels ("mm-hm") do not count, for or against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.nano.sentences import BACKCHANNELS, REPLIES
from rewards.repetition import words_of

REQUESTS = {
    "what do you think?": "opinion",
    "is that a good plan?": "opinion",
    "can you help me with that?": "help",
    "do you have an idea?": "idea",
    "what would you do?": "idea",
    "could you tell me more?": "more",
    "please tell me what you know.": "more",
    "so that is my question.": "question",
}
SUITS = {
    "opinion": (
        "That sounds like a good plan to me.", "I think you should try it this week.",
        "It is not as hard as it looks.", "Most people like the second way better.",
        "The old one is still good enough.", "My answer is yes, if you have the money.",
        "I can see why you would say that.", "It depends on how much time you have.",
    ),
    "help": (
        "We can look at it together now.", "You could ask a friend for help.", "First make a list of what you need.",
        "Let me tell you what I know.", "I would start with the small things.", "It is not as hard as it looks.",
    ),
    "idea": (
        "I would start with the small things.", "You could ask a friend for help.",
        "There are two good ways to do that.", "First make a list of what you need.",
        "I would wait for a warm and dry day.", "Take a walk and think about it.",
        "I think you should try it this week.", "You do not have to decide today.",
    ),
    "more": (
        "Let me tell you what I know.", "There are two good ways to do that.", "You can find one near the station.",
        "It should not cost very much.", "I believe it opens at nine.", "The best time is early in the morning.",
        "Most people like the second way better.", "It depends on how much time you have.",
    ),
    "question": (
        "That is a very good question.", "Let me tell you what I know.", "I am happy that you asked me.",
        "There are two good ways to do that.", "We can look at it together now.",
    ),
}  # fmt: skip
MOSTLY, HALF = 0.8, 0.5
PHRASE, TELLING_PHRASE = 3, 4
_SENTENCES = {tuple(words_of(reply)): reply for reply in REPLIES}
_PHRASES: dict[tuple[str, ...], set[str]] = {}
for _words, _reply in _SENTENCES.items():
    for _first in range(len(_words)):
        for _last in range(_first + PHRASE, len(_words) + 1):
            _PHRASES.setdefault(_words[_first:_last], set()).add(_reply)
_LONGEST = max(map(len, _SENTENCES))
_BACKCHANNELS = {word for text in BACKCHANNELS for word in words_of(text)}


def relevance(turns: Sequence[Mapping[str, str]]) -> tuple[int, str]:
    """0, 1 or 2 for what MODEL says after the last USER turn, and why.

    Args:
        turns: `{"role": "USER" | "MODEL", "text": ...}`, as in the judge's prompt.
    """
    if not turns or turns[-1]["role"] != "MODEL":
        return 0, "no answer"
    phrases, counted = _phrases(words_of(turns[-1]["text"]))
    within = sum(map(len, phrases))
    share = f"{within} of {counted} words are in phrases"
    if not counted or within < HALF * counted:
        return 0, share
    request = next((kind for ending, kind in REQUESTS.items() if _ends_with(turns, ending)), None)
    suited = [p for p in phrases if len(p) >= TELLING_PHRASE and _PHRASES[p] & set(SUITS.get(request or "", ()))]
    if suited and within >= MOSTLY * counted:
        return 2, f"{share}, '{' '.join(suited[0])}' suits a request for {request}"
    return 1, f"{share}, " + (f"none suits a request for {request}" if not suited else "not enough of them")


def _ends_with(turns: Sequence[Mapping[str, str]], ending: str) -> bool:
    asked = words_of(turns[-2]["text"]) if len(turns) > 1 else []
    return asked[-len(words_of(ending)) :] == words_of(ending)


def _phrases(words: Sequence[str]) -> tuple[list[tuple[str, ...]], int]:
    """The phrases in the words, each as long as can be from left to right, and how many words count."""
    phrases = []
    at = counted = 0
    while at < len(words):
        rest = tuple(words[at : at + _LONGEST])
        size = next((n for n in range(len(rest), PHRASE - 1, -1) if rest[:n] in _PHRASES), 0)
        if size:
            phrases.append(rest[:size])
        counted += size or (words[at] not in _BACKCHANNELS)
        at += size or 1
    return phrases, counted
