"""What the user and the agent of a nano dialogue say.

The user's sentences are composed from clauses, so that thousands are different; a hash of the whole sentence decides
whether it belongs to the training or to the held-out part. The agent draws from a closed set: nano has to say real
words, not many.

Three cues tell the agent what it may do next, and they are meant to be audible:

- a *filler* at an inner pause ("and um,"): the sentence goes on,
- a *closing* at the end of a turn ("what do you think?"): the sentence is complete,
- an *invitation* at a clause boundary of a long turn ("you know,"): a backchannel is welcome.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

OPENINGS = (
    "I was thinking about", "I have been looking at", "we are planning", "my sister told me about",
    "I would like to talk about", "I am not sure about", "yesterday I read about", "I keep worrying about",
    "my neighbour asked me about", "we had a long talk about", "I am curious about", "I need to decide about",
    "someone showed me", "I just heard about", "they want us to change", "I tried to understand",
    "our team is working on", "I spent the morning with", "I wanted to ask about", "we finally finished",
)  # fmt: skip
OBJECTS = (
    "the trip to the mountains", "a new garden table", "the music for the party", "that old house by the river",
    "the train to the city", "my daughter's birthday", "the price of the tickets", "a small kitchen with a window",
    "the report from last week", "the weather on the coast", "a course in painting", "the meeting on Thursday",
    "the car my father drives", "dinner with six friends", "a dog from the shelter", "the book about the sea",
    "the broken heating", "the plan for the summer", "a job in another town", "the photographs of the wedding",
    "the bread I baked", "the long road home", "a doctor near the school", "the colour of the walls",
    "the new telephone", "a holiday in the north", "the football match", "the letter from the bank",
    "the apple trees", "the noise in the street",
)  # fmt: skip
TAILS = (
    "", "with my brother", "before the summer", "for next weekend", "after work", "this morning", "at the office",
    "in the evening", "with the whole family", "over the phone", "a few days ago", "until very late",
)  # fmt: skip
CONTINUATIONS = (
    "maybe we could leave a little earlier", "it would cost less than the other one",
    "nobody has told me how it works", "there is still a lot to do", "I do not want to wait much longer",
    "my mother thinks it is too far", "we would have to bring the children", "the second one looked better to me",
    "it might rain the whole day", "we could ask somebody else", "I have never done it before",
    "they close at five on Monday", "I forgot where I put the key", "it takes about two hours",
    "the first answer was wrong", "everyone seemed happy with it",
)  # fmt: skip
CLOSINGS = (
    "what do you think?", "can you help me with that?", "do you have an idea?", "what would you do?",
    "is that a good plan?", "could you tell me more?", "so that is my question.", "please tell me what you know.",
)  # fmt: skip
FILLERS = ("and um,", "but um,", "so um,", "because um,", "and uh,", "but uh,")
INVITATIONS = ("you know,", "you see,", "right,")
QUESTIONS = ("what about", "I meant", "I only mean", "let us talk about", "I forgot about", "first tell me about")
INTERRUPTIONS = ("wait, sorry,", "no, hold on,", "sorry, one moment,", "hang on, please,")

BACKCHANNELS = ("mm-hm", "yeah", "right", "okay")
REPLIES = (
    "That sounds like a good plan to me.", "I think you should try it this week.", "Let me tell you what I know.",
    "It depends on how much time you have.", "You could ask a friend for help.", "I would start with the small things.",
    "That is a very good question.", "Most people like the second way better.", "It is not as hard as it looks.",
    "We can look at it together now.", "I would wait for a warm and dry day.", "The best time is early in the morning.",
    "You can find one near the station.", "It should not cost very much.", "I am happy that you asked me.",
    "There are two good ways to do that.", "First make a list of what you need.",
    "Then call them and ask for the price.",
    "I hope that it goes well for you.", "My answer is yes, if you have the money.", "You do not have to decide today.",
    "Take a walk and think about it.", "I can see why you would say that.", "That must have been a lot of work.",
    "It is always nice to see your family.", "Bring some water and good shoes.", "The old one is still good enough.",
    "Maybe you can share it with someone.", "I believe it opens at nine.", "They will know what to do next.",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A stretch of user speech synthesised in one go, and what follows it: a `pause`, an `invite` or the `end`."""

    text: str
    then: str


def is_held_out(pieces: tuple[Piece, ...]) -> bool:
    """True for the eighth of all sentences that only the held-out dialogues may use."""
    words = " ".join(piece.text for piece in pieces)
    return hashlib.sha256(words.encode()).digest()[0] < 32


def user_sentence(kind: str, rng: np.random.Generator, held_out: bool) -> tuple[Piece, ...]:
    """One user utterance. kind: `turn`, `pause` (one or two inside), `long` (invites backchannels), `interrupt`."""
    while True:
        pieces = _compose(kind, rng)
        if is_held_out(pieces) == held_out:
            return pieces


def _compose(kind: str, rng: np.random.Generator) -> tuple[Piece, ...]:
    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    tail = pick(TAILS) if kind == "turn" else ""
    opening = f"{pick(OPENINGS)} {pick(OBJECTS)} {tail}".strip()
    closing = pick(CLOSINGS)
    if kind == "turn":
        return (Piece(f"{opening}, {closing}", "end"),)
    if kind == "interrupt":
        return (Piece(f"{pick(INTERRUPTIONS)} {pick(QUESTIONS)} {pick(OBJECTS)}, {closing}", "end"),)
    if kind == "pause":
        pieces = [Piece(f"{opening}, {pick(FILLERS)}", "pause")]
        if rng.random() < 0.2:
            pieces.append(Piece(f"{pick(CONTINUATIONS)}, {pick(FILLERS)}", "pause"))
        return (*pieces, Piece(f"{pick(CONTINUATIONS)}, {closing}", "end"))
    if kind == "long":
        pieces = [Piece(f"{opening}, {pick(INVITATIONS)}", "invite")]
        if rng.random() < 0.6:
            pieces.append(Piece(f"{pick(CONTINUATIONS)}, {pick(INVITATIONS)}", "invite"))
        return (*pieces, Piece(f"{pick(CONTINUATIONS)}, {closing}", "end"))
    raise ValueError(f"unknown kind of user utterance: {kind!r}")
