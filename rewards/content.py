"""Content: is what the agent says worth saying? A language model judges the words (arXiv 2606.11167, section 3)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from envs.episode import Episode, Word
from envs.errors import InputError
from envs.segments import SEGMENT_AXES, Segment
from envs.utterances import MAX_PAUSE_SECONDS
from rewards.axis import Figure, LeftOut, RewardAxis, Score, register_axis
from rewards.judge import Field, Judge, JudgeConfig, Question, Rubric, Turn, Verdict
from rewards.transcripts import make_transcriber

log = logging.getLogger(__name__)


def alternating_turns(user: Sequence[Word], agent: Sequence[Word], max_pause: float = MAX_PAUSE_SECONDS) -> list[Turn]:
    """The words of both sides as alternating turns.

    Each side's words are joined to utterances over silences of at most `max_pause` seconds, the utterances of both are
    put in the order of their beginnings, and neighbours of one side become one turn. So a "mm-hm" within a long
    utterance follows it rather than tearing it apart.
    """
    spoken = []
    for role, words in (("USER", user), ("MODEL", agent)):
        end = float("-inf")
        for word in words:
            if word.start - end > max_pause:
                spoken.append((word.start, role, [word.text]))
            else:
                spoken[-1][2].append(word.text)
            end = max(end, word.end)
    turns: list[tuple[str, list[str]]] = []
    for _, role, texts in sorted(spoken, key=lambda utterance: (utterance[0], utterance[1] == "MODEL")):
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(texts)
        else:
            turns.append((role, list(texts)))
    return [Turn(role, " ".join(texts)) for role, texts in turns]


@dataclass
class JudgedAxis(RewardAxis):
    """An axis that a judge scores by a rubric; a subclass gives `rubric`, whose one field is the value.

    Details: `turns` `[[role, text], ...]` as the judge saw them, and its `reason`.

    Attributes:
        judge: options of `rewards.judge.JudgeConfig`; `base_url` and `model` are needed.
        user: where the user's words come from: `corpus` or `asr`.
        agent: where the agent's words come from: `inner_monologue` or `asr`.
        asr: options of `rewards.transcripts.SpeechRecogniser`; `model` is needed.
        axes: the segment axes that it scores, where they are not the class' own.
    """

    judge: Any = None
    user: str = "corpus"
    agent: str = "inner_monologue"
    asr: dict[str, Any] = field(default_factory=dict)
    axes: Sequence[str] | None = None

    rubric: ClassVar[Rubric]
    silence: ClassVar[Score | None] = None
    """The score of an agent that says nothing, about which nobody is asked."""

    def __post_init__(self) -> None:
        try:
            self._judge = Judge(_judge_config(self.judge))
            self._user = make_transcriber("user", self.user, self.asr)
            self._agent = make_transcriber("agent", self.agent, self.asr)
        except InputError as error:
            raise InputError(f"reward axis '{self.name}': {error}") from error
        if self.axes is not None:
            unknown = [axis for axis in self.axes if axis not in SEGMENT_AXES]
            if isinstance(self.axes, str) or unknown:
                raise InputError(f"reward axis '{self.name}': `axes` must be a list of {', '.join(SEGMENT_AXES)}")
            self.applies_to = tuple(self.axes)  # type: ignore[misc]  # this axis' own, not the class'
        self._counted: dict[str, float] = self._judge.meter.read()
        self._unknown = 0
        self._left_out: LeftOut | None = None

    def prepare(self, segments: Sequence[Segment]) -> None:
        mine = [segment for segment in segments if segment.axis in self.applies_to]
        try:
            if mine:
                self._user.prepare(mine)
                self._agent.prepare(mine)
            self._judge.check()
        except InputError as error:
            raise InputError(f"reward axis '{self.name}': {error}") from error

    def score(self, episodes: Sequence[Episode]) -> list[Score | None]:
        return self.begin(episodes)()

    def begin(self, episodes: Sequence[Episode]) -> Callable[[], list[Score | None]]:
        rows = [row for row, episode in enumerate(episodes) if episode.segment.axis in self.applies_to]
        chosen = [episodes[row] for row in rows]
        both = list(zip(rows, self._user.words(chosen), self._agent.words(chosen), strict=True))
        scores: list[Score | None] = [None] * len(episodes)
        asked: list[tuple[int, list[Turn]]] = []
        unknown = 0
        for row, user, agent in both:
            if user is None or agent is None:
                unknown += 1
            elif not agent:
                scores[row] = self.silence
            else:
                asked.append((row, alternating_turns(user, agent)))
        verdicts = self._judge.begin([Question(self.rubric, tuple(turns)) for _, turns in asked])

        def finish() -> list[Score | None]:
            failed = 0
            for (row, turns), verdict in zip(asked, verdicts.result(), strict=True):
                failed += verdict is None
                scores[row] = None if verdict is None else self._score(verdict, turns)
            self._unknown += unknown
            self._warn(failed, unknown, len(rows))
            return scores

        return finish

    def metrics(self) -> dict[str, Figure]:
        """What `rewards.judge.Meter` counts; `failed` includes the episodes whose words nobody knows."""
        now = self._judge.meter.read()
        since = {name: value - self._counted[name] for name, value in now.items()}
        self._counted = now
        since["failed"] += self._unknown
        self._unknown = 0
        seconds = since.pop("seconds")
        return {**since, "latency": (seconds, since["calls"])}

    def _score(self, verdict: Verdict, turns: Sequence[Turn]) -> Score:
        said = [[turn.role, turn.text] for turn in turns]
        return Score(float(verdict.scores[self.rubric.fields[0].name]), {"turns": said, "reason": verdict.reason})

    def _warn(self, failed: int, unknown: int, total: int) -> None:
        reasons = [f"the judge: {self._judge.last_failure}"] if failed else []
        reasons += ["no transcript"] if unknown else []
        now = LeftOut(failed + unknown, total, tuple(reasons))
        self._left_out = now if self._left_out is None else self._left_out + now
        if now.many:
            log.warning("%s: %s", self.name, now)

    def left_out(self) -> LeftOut | None:
        found, self._left_out = self._left_out, None
        return found


def _judge_config(options: Any) -> JudgeConfig:
    if isinstance(options, JudgeConfig):
        return options
    known = [option.name for option in fields(JudgeConfig)]
    if not isinstance(options, Mapping) or not {"base_url", "model"} <= set(options):
        raise InputError("a judge is needed: give `judge: {base_url: http://.../v1, model: ...}`")
    unknown = sorted(set(options) - set(known))
    if unknown:  # its value is not shown: it may be a key
        raise InputError(f"judge: unknown option `{unknown[0]}`: the options are {', '.join(known)}")
    return JudgeConfig(**options)


@register_axis
@dataclass
class Content(JudgedAxis):
    """0, 1 or 2 for the words, by a language model as judge (arXiv 2606.11167, section 3, rewards).

    0: irrelevant, unnatural or nothing; 1: loosely related, generic; 2: natural, specific, grounded in what the user
    said. The judge sees both sides as alternating turns, context included. An agent that says nothing gets 0 and
    nobody is asked; what the judge cannot judge is None and left out. Options: see `JudgedAxis`.

    Details: `turns` `[[role, text], ...]` and the judge's `reason`.
    """

    name = "content"
    applies_to = ("turn_taking", "user_interruption")
    silence = Score(0.0, {"reason": "the agent said nothing"})
    rubric = Rubric(
        "content",
        "You judge the words of a speech model (MODEL) in a spoken conversation with a person (USER). Judge what the "
        "MODEL says in reply to the USER, above all to the USER's last turn, by its meaning alone: not its timing, and "
        "not the missing punctuation of a transcript. The conversation may break off in the middle of a sentence; that "
        "is no fault. A turn of the USER that the MODEL does not answer at all counts as nothing said.",
        (
            Field(
                "score",
                0,
                2,
                "0 = irrelevant, unnatural, incoherent, or nothing; 1 = loosely related or generic; "
                "2 = natural, specific, grounded in what the USER said",
            ),
        ),
    )
