"""The mean of the weights of two models of one shape, where the second was trained on from the first.

A model trained on for something new loses some of what it could; on the way between both lies one that has
most of either (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gguf_model import load_gguf
from model import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="GGUF")
    parser.add_argument("--new", type=Path, required=True, help="checkpoint")
    parser.add_argument("--share", type=float, default=0.7, help="of the new one")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, for export.py")
    args = parser.parse_args()
    old, (model, _) = load_gguf(args.old).state_dict(), load(args.new)
    new = model.state_dict()
    model.load_state_dict({key: old[key] * (1 - args.share) + new[key] * args.share for key in new})
    model.save(args.out)


if __name__ == "__main__":
    main()
