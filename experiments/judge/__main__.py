"""`python -m experiments.judge --port 8731`: serve the judge until Ctrl-C."""

import argparse
import contextlib

from experiments.judge.server import MODEL, JudgeServer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.judge", description=__doc__)
    parser.add_argument("--port", type=int, default=8731, help="0 takes a free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that a judgement takes")
    options = parser.parse_args()
    server = JudgeServer(options.port, options.latency)
    print(f"judging as model {MODEL} at {server.base_url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
