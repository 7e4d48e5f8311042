"""`python -m rlhf_duplex.moshi_server ARGUMENTS`: `python -m moshi.server ARGUMENTS` on a machine without a GPU.

Moshi's server ends its warm-up with a wait for CUDA whatever `--device` says, and stops there where no driver is. The
wait is left out; everything else is the server as it is installed.
"""

import runpy

import torch


def main() -> None:
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    runpy.run_module("moshi.server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
