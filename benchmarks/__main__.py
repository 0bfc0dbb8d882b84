"""``python -m benchmarks report``: tables and plots of results."""

from __future__ import annotations

import sys

from . import report

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit("usage: python -m benchmarks report FILE...   (`pytest benchmarks` runs the benchmarks)")
    sys.exit(report.main(sys.argv[2:]))
