"""``python -m sllm``: the command line of :mod:`sllm.cli`."""

from __future__ import annotations

import sys

from sllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
