"""``python -m sllm``: the command line of :mod:`sllm.cli.main`."""

from __future__ import annotations

import sys

from sllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
