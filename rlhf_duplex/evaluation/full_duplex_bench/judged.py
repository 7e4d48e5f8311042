"""What a language model says of the agent's words: the rating of v1's interruptions, the behaviour classes of v1.5.

Both go through `rewards.judge`: what cannot be judged is left out and counted, and words in a transcript are never
instructions. The benchmark's own models (gpt-4-turbo, gpt-4o) are a choice of `model`; its prompts ask the same.
"""

from collections.abc import Mapping, Sequence

from envs.episode import Word
from rewards.judge import Field, Judge, Question, Rubric, Turn
from rlhf_duplex.evaluation.full_duplex_bench.metrics import takeover
from rlhf_duplex.evaluation.full_duplex_bench.samples import Sample

BEHAVIOURS = ("respond", "resume", "uncertain", "unknown")

RATING = Rubric(
    "interruption_rating",
    "A person (USER) and a speech model (MODEL) talk. The USER speaks, the MODEL answers, and while it speaks the USER "
    "interrupts it. The last turn of the USER is the interruption. Rate how related the MODEL's response after it is "
    "to the interruption.",
    (
        Field(
            "rating",
            0,
            5,
            "0 = totally unrelated to the interrupting turn; 1 = not related; 2 = slightly related; 3 = related; "
            "4 = highly related; 5 = perfectly related",
        ),
    ),
)

BEHAVIOUR = Rubric(
    "overlap_behaviour",
    "A person (USER) and a speech model (MODEL) talk. While the MODEL speaks, other speech is heard in the USER's "
    "audio: an interruption, a backchannel, the USER talking to somebody else, or voices in the background. The last "
    "turn of the USER is that overlapping speech; the MODEL's turn before it is what it said until then, its last turn "
    "is what it said from then on. Classify what the MODEL does in that last turn.",
    (
        Field(
            "behaviour",
            0,
            3,
            "0 = it addresses the content of the overlapping speech; 1 = it ignores it and continues what it was "
            "saying; 2 = it signals that it did not hear or understand, without a clear answer; 3 = none of these, "
            "off target or without information",
        ),
    ),
)


def ratings(judge: Judge, samples: Sequence[Sample], words: Mapping[str, Sequence[Word]]) -> dict[str, float]:
    """0 to 5 for each interruption in which the agent takes the turn, by the sample's name.

    Args:
        judge: who is asked.
        samples: of v1; those of other tasks are left out.
        words: of the agent, by the sample's name.
    """
    asked: dict[str, Question] = {}
    for sample in samples:
        if sample.task != "user_interruption" or sample.event is None:
            continue
        after = [word for word in words[sample.name] if word.start >= sample.event.end]
        if takeover(after):
            turns = [Turn("USER", text) for text in _said(sample)]
            asked[sample.name] = Question(RATING, (*turns, Turn("MODEL", _text(after))))
    return _ask(judge, asked, "rating")


def behaviours(
    judge: Judge, samples: Sequence[Sample], words: Mapping[str, Sequence[Word]]
) -> dict[str, dict[str, float]]:
    """For each sample of v1.5, by its name, 1 for the class of its behaviour and 0 for the others.

    An agent that says nothing after the overlap begins is `unknown`, and nobody is asked (the official rule).
    """
    asked: dict[str, Question] = {}
    classes: dict[str, int] = {}
    for sample in samples:
        if sample.clean or sample.event is None:
            continue
        before = [word for word in words[sample.name] if word.start < sample.event.start]
        after = [word for word in words[sample.name] if word.start >= sample.event.start]
        if not after:
            classes[sample.name] = BEHAVIOURS.index("unknown")
            continue
        context, overlap = sample.texts.get("context", ""), sample.texts.get("interrupt", "")
        turns = [
            Turn("USER", context),
            Turn("MODEL", _text(before)),
            Turn("USER", overlap),
            Turn("MODEL", _text(after)),
        ]
        asked[sample.name] = Question(BEHAVIOUR, tuple(turn for turn in turns if turn.text))
    classes |= {name: int(value) for name, value in _ask(judge, asked, "behaviour").items()}
    return {
        name: {behaviour: float(index == chosen) for index, behaviour in enumerate(BEHAVIOURS)}
        for name, chosen in classes.items()
    }


def _said(sample: Sample) -> list[str]:
    return [sample.texts[name] for name in ("context", "interrupt") if sample.texts.get(name)]


def _text(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def _ask(judge: Judge, questions: Mapping[str, Question], field: str) -> dict[str, float]:
    verdicts = judge.ask(list(questions.values()))
    return {
        name: float(verdict.scores[field])
        for name, verdict in zip(questions, verdicts, strict=True)
        if verdict is not None
    }
