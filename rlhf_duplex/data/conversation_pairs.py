"""From logged conversations to pairs: a batch of dialogues is read, its problems are found, pairs are built.

In each dialogue problems are taken in the order of time until there are as many pairs as wanted (two: the first
problem, and at most one more, as in arXiv 2506.21463); a problem that no pair can be made of is counted and passed
over.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.errors import InputError
from envs.speech import SpeechDetector
from envs.utterances import utterances
from rewards.judge import Judge
from rewards.rubric import Verdict
from rlhf_duplex.data.chosen import Continuations, Dialogue, Unusable, drawn_reply, moved_reply, rewritten_reply
from rlhf_duplex.data.content import is_problem, marks, question
from rlhf_duplex.data.conversation import Conversation, Entry, check_words, read_conversation
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.data.parts import Part
from rlhf_duplex.data.problems import TAKEOVER_SECONDS, Problem, find_interruptions, find_unresponsive
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.data.synthesis import Speech, Synthesiser, fitted
from rlhf_duplex.policy.moshi import MoshiPolicy

Verdicts = dict[Problem, Verdict | None]


@dataclass
class ConversationPairs:
    """Makes the pairs of dialogues.

    Attributes:
        streams, policy, detector: of the bundle.
        options: how.
        judge, synthesiser: find and mend content problems; None leaves those out.
    """

    streams: Streams
    policy: MoshiPolicy
    detector: SpeechDetector
    options: PairOptions
    judge: Judge | None = None
    synthesiser: Synthesiser | None = None

    def make(self, entries: Sequence[Entry]) -> list[Part | None]:
        """A part for each entry; None where the judge was away, so that the dialogue is left for another run.

        Raises:
            InputError: a bad recording, with `strict`.
        """
        parts: list[Part | None] = [None] * len(entries)
        dialogues: dict[int, Dialogue] = {}
        for index, found in enumerate(self._read(entries)):
            if isinstance(found, InputError):
                parts[index] = Part(error=str(found), counts=Counter({"recordings that were skipped": 1}))
            else:
                dialogues[index] = found
        problems = {index: self._by_rule(dialogue) for index, dialogue in dialogues.items()}
        verdicts = self._judge(dialogues, problems)
        for index, dialogue in dialogues.items():
            marked = verdicts.get(index, {})
            if marked is not None:
                parts[index] = self._build(entries[index], dialogue, problems[index], marked)
        return parts

    def _read(self, entries: Sequence[Entry]) -> list[Dialogue | InputError]:
        """Dialogues with their speech found, all in one call of the detector; or why one cannot be used."""
        logs: list[Conversation | InputError] = []
        for entry in entries:
            try:
                logs.append(read_conversation(entry, self.streams.codec.sample_rate))
            except InputError as error:
                if self.options.strict:
                    raise
                logs.append(error)
        clips = [clip for log in logs if isinstance(log, Conversation) for clip in (log.agent_audio, log.user_audio)]
        speech = iter(self.detector.detect(clips, self.streams.codec.sample_rate) if clips else [])
        read: list[Dialogue | InputError] = []
        for log in logs:
            if isinstance(log, InputError):
                read.append(log)
                continue
            agent, user = next(speech), next(speech)
            try:
                check_words(log, agent, user)
            except InputError as error:
                if self.options.strict:
                    raise
                read.append(error)
                continue
            read.append(Dialogue(log, tuple(utterances(agent)), tuple(utterances(user)), tuple(user)))
        return read

    def _by_rule(self, dialogue: Dialogue) -> list[Problem]:
        found = find_interruptions(dialogue.user, dialogue.agent)
        found += find_unresponsive(dialogue.user, dialogue.agent, dialogue.log.duration, self.options.response)
        return found

    def _judge(self, dialogues: dict[int, Dialogue], problems: dict[int, list[Problem]]) -> dict[int, Verdicts | None]:
        """The judge's verdicts on the replies of each dialogue that interrupt nobody, None for those that it refused;
        None for a dialogue of which it was not there to judge all."""
        if self.judge is None:
            return {}
        asked = [
            (index, Problem("content", reply.start, None, reply))
            for index, dialogue in dialogues.items()
            for reply in dialogue.agent
            if reply.duration > TAKEOVER_SECONDS
            and all(problem.reply is not reply for problem in problems[index])
            and dialogue.words_of(reply)
        ]
        questions = [
            question(dialogues[i].log, p.reply, dialogues[i].words_of(p.reply)) for i, p in asked if p.reply is not None
        ]
        verdicts: dict[int, Verdicts | None] = {index: {} for index in dialogues}
        answers = self.judge.ask(questions) if questions else []
        for (index, problem), asking, verdict in zip(asked, questions, answers, strict=True):
            marked = verdicts[index]
            if verdict is None and not self.judge.refused(asking):
                verdicts[index] = None
            elif marked is not None:
                marked[problem] = verdict
        return verdicts

    def _build(self, entry: Entry, dialogue: Dialogue, problems: list[Problem], verdicts: Verdicts) -> Part:
        counts: Counter[str] = Counter({"recordings": 1, "seconds": round(dialogue.log.duration)})
        judged = {problem: verdict for problem, verdict in verdicts.items() if verdict is not None}
        counts["replies that were judged"] = len(judged)
        counts["replies that the judge refused"] = len(verdicts) - len(judged)
        counts["word ends that were clipped"] = dialogue.log.clipped
        content = [p for p, v in judged.items() if is_problem(v, self.options.content_at_most)]
        pairs: list[Pair] = []
        for problem in sorted([*problems, *content], key=lambda p: p.time):
            counts[f"problems: {problem.kind}"] += 1
            if len(pairs) == self.options.max_pairs:
                counts["dropped: beyond the pairs of a dialogue"] += 1
                continue
            try:
                made = self._continuations(entry, dialogue, problem, verdicts.get(problem), counts)
            except Unusable as why:
                counts[f"dropped: {problem.kind}, {why}"] += 1
                continue
            details = dict(made.details)
            verdict = verdicts.get(problem)
            if verdict is not None:
                details["judge"] = marks(verdict)
            pairs.append(_pair(entry, len(pairs), problem, made, details, dialogue, self.streams.frame_rate))
        return Part(tuple(pairs), +counts)

    def _continuations(
        self, entry: Entry, dialogue: Dialogue, problem: Problem, verdict: Verdict | None, counts: Counter[str]
    ) -> Continuations:
        if problem.kind == "interruption":
            return moved_reply(self.streams, dialogue, problem, self.options)
        if problem.kind == "unresponsive":
            seed = int.from_bytes(hashlib.sha256(f"{entry.id}/{problem.time:.3f}".encode()).digest()[:4], "big")
            return drawn_reply(self.streams, self.policy, self.detector, dialogue, problem, self.options, seed)
        assert verdict is not None
        speech = self._speak(dialogue, problem, verdict.text, counts)
        return rewritten_reply(self.streams, dialogue, problem, speech, self.options)

    def _speak(self, dialogue: Dialogue, problem: Problem, rewrite: str, counts: Counter[str]) -> Speech:
        """The rewrite as speech, at the level of the reply; words that the tokenizer does not have are left out."""
        assert self.synthesiser is not None
        assert problem.reply is not None
        words = rewrite.split()
        kept = [word for word in words if self.streams.aligner.sayable(word.strip(".,?!"))]
        counts["rewritten words that the tokenizer lacks"] += len(words) - len(kept)
        if not kept:
            raise Unusable("the rewrite has no word that the tokenizer has")
        text = " ".join(kept)
        if [w.strip(".,?!").lower() for w in kept] == [w.text.lower() for w in dialogue.words_of(problem.reply)]:
            raise Unusable("the rewrite is the reply itself")
        rate = dialogue.log.sample_rate
        units = [dialogue.log.agent_audio[round(u.start * rate) : round(u.end * rate)] for u in problem.reply.units]
        spoken = np.concatenate(units)  # the first alone may be a murmur
        level = float(np.sqrt(np.mean(spoken**2)))
        try:
            return fitted(self.synthesiser.speak(text), text, rate, level, self.detector)
        except InputError as error:
            raise Unusable("the synthesiser said nothing") from error


def _pair(
    entry: Entry,
    number: int,
    problem: Problem,
    made: Continuations,
    details: dict[str, Any],
    dialogue: Dialogue,
    frame_rate: float,
) -> Pair:
    end = made.start + (made.context.shape[1] + made.chosen.shape[1]) / frame_rate
    provenance = {
        "source": "conversations",
        "dialogue": entry.id,
        "recording": str(entry.path),
        "time": problem.time,
        "start": made.start,
        # The user's words within the pair, in the form of a segment's transcript.
        "transcript": [
            [w.text, [w.start, w.end], "user"] for w in dialogue.log.user_words if made.start <= w.start < end
        ],
        **details,
    }
    return Pair(
        id=f"{entry.id}#{number}",
        kind=problem.kind,
        split="train",  # decided when all parts are put together
        context=made.context,
        chosen=made.chosen,
        rejected=made.rejected,
        chosen_span=(0, made.chosen.shape[1]),
        rejected_span=(0, made.rejected.shape[1]),
        provenance=provenance,
    )
