"""The process of one trial: `python -m rlhf_duplex.ablate.worker CONFIG OUTCOME`, a line of JSON on standard input.

It trains as `rlhf-duplex train` does and dies with whoever started it: its standard input is held open by them and
ends with them, however they end. What went wrong is written to OUTCOME; an exit without it was a kill from outside.
"""

import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from envs.files import write_text

TRACE_LINES = 30


def main(config_path: str, outcome_path: str) -> int:
    """Run it: 0 where it ended or was asked to stop, 1 with OUTCOME where it failed."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Where memory runs out, the system is to kill this process rather than the one that keeps the books.
    Path("/proc/self/oom_score_adj").write_text("800") if os.path.exists("/proc/self/oom_score_adj") else None
    if order["memory_gb"]:
        limit = int(order["memory_gb"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        _run(order["command"], Path(config_path), order["overrides"])
        return 0
    except Exception as error:  # noqa: BLE001 whatever it is, it is this trial's and is reported with it
        traceback.print_exc()
        text = " ".join(str(error).split())
        lines = traceback.format_exc().splitlines()[-TRACE_LINES:]
        where = "\n".join(lines).replace(f"{Path(__file__).parents[2]}/", "")
        record = {"kind": type(error).__name__, "message": text, "traceback": where}
        write_text(Path(outcome_path), json.dumps(record) + "\n")
        return 1


def _run(command: str, path: Path, overrides: list[str]) -> Any:
    from rlhf_duplex.config import load_config
    from rlhf_duplex.run import evaluate, train

    return (train if command == "train" else evaluate)(load_config(path, overrides))


def _die_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
