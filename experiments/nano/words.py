"""The questions and requests that ship with nano, from its held-out dialogues: `python -m experiments.nano.words`.

A question's accepted answers are the replies that suit what its last words ask for (`experiments.judge.relevance`).
"""

import json
from pathlib import Path
from typing import Any

from experiments.judge.relevance import REQUESTS, SUITS
from rewards.repetition import words_of

DATA = Path(__file__).parents[2] / "rlhf_duplex" / "nano_data"
OF_EACH, REQUESTED = 3, 8


def _item(name: str, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    said = " ".join(word for word, _, speaker in row["transcript"] if speaker == "user")
    audio = f"../heldout/{row['recording']}"
    place = {"channel": row["user_channel"], "start": row["start"], "end": row["events"]["user_turn_end"]}
    return {"id": name, "audio": audio, **place, "text": said, **more}


def _closing(row: dict[str, Any]) -> str:
    said = words_of(" ".join(word for word, _, speaker in row["transcript"] if speaker == "user"))
    return next(closing for closing in REQUESTS if said[-len(words_of(closing)) :] == words_of(closing))


def main() -> None:
    rows = [json.loads(line) for line in (DATA / "heldout" / "segments.jsonl").read_text().splitlines()]
    turns = [row for row in rows if row["axis"] == "turn_taking"]
    questions: list[dict[str, Any]] = []
    used: dict[str, int] = {}
    for row in turns:
        closing = _closing(row)
        used[closing] = used.get(closing, 0) + 1
        if used[closing] <= OF_EACH:
            answers = [reply.rstrip(".").replace(",", "") for reply in SUITS[REQUESTS[closing]]]
            questions.append(_item(f"q{len(questions):02d}", row, answers=answers))
    requests = [_item(f"s{index:02d}", row) for index, row in enumerate(turns[-REQUESTED:])]
    for name, items in (("questions", questions), ("safety", requests)):
        path = DATA / "words" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        print(f"wrote {len(items)} items to {path}")


if __name__ == "__main__":
    main()
