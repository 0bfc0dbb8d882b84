"""What detectors find and what they take for private that is not, by kind; and how fast the tagger is.

On our own texts, and on every file in the folder ``$SLLM_PRIVACY_SETS``:

* ``*.jsonl``: a text in each line, ``{"text": "...", "spans": [[start, end, "NAME"], ...]}`` with offsets in
  characters and kinds of :data:`sllm.privacy.KINDS`;
* ``*.bio``: a token and its tag in each line, with white space between, and an empty line after each
  sentence: ``B-PER``, ``I-PER``, ``O`` (also ``M-``, ``E-`` and ``S-``). Tokens of Chinese are put together
  without spaces.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sllm.engine.tagger import Tagger
from sllm.privacy import Detector, NameDetector, PatternDetector, TaggerDetector, default_detectors
from sllm.privacy.names import census, lac

from .measure import Benchmark

Report = Callable[[dict[str, Any], dict[str, bool]], None]
Text = tuple[str, list[tuple[int, int, str]]]

pytestmark = pytest.mark.timeout(1800)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
try:
    import privacy_corpus
    import privacy_prose
    import privacy_samples
    import taggers
finally:
    sys.path.pop(0)

_KINDS = {"PER": "NAME", "PERSON": "NAME", "GPE": "PLACE", "LOC": "PLACE", "ORG": "ORG"}
US_PER_CHAR = 12.0


# ---- texts -------------------------------------------------------------------------------------------------


def _prose(language: str) -> list[Text]:
    found = [*privacy_prose.sentences(language, clean=False), *privacy_prose.sentences(language, clean=True)]
    return [(one.text, [(*name, "NAME") for name in one.names]) for one in found]


def _samples() -> list[Text]:
    blocks = (
        privacy_samples.FIRST,
        privacy_samples.SECOND,
        privacy_samples.CLEAN,
        privacy_samples.SECOND_CLEAN,
    )
    return [(one.text, list(one.spans)) for block in blocks for one in privacy_samples.parse(block)]


def _generated() -> list[Text]:
    cases = [
        (case.text, [(start, end, name.partition("/")[0]) for start, end, name in case.spans])
        for case in privacy_corpus.cases(3000, seed=5)
    ]
    return [*cases, *((text, []) for text in privacy_corpus.clean(1000, seed=6))]


def _json_lines(path: Path) -> list[Text]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(row["text"], [(int(a), int(b), str(kind)) for a, b, kind in row["spans"]]) for row in rows]


def _bio(path: Path) -> list[Text]:
    return [
        _sentence(block.splitlines())
        for block in path.read_text(encoding="utf-8").split("\n\n")
        if block.strip()
    ]


def _sentence(lines: list[str]) -> Text:
    text = ""
    spans: list[tuple[int, int, str]] = []
    for line in lines:
        columns = line.split()
        if len(columns) < 2:
            continue
        token, tag = columns[0], columns[-1]
        if text and text[-1].isascii() and token[0].isascii():
            text += " "
        start, text = len(text), text + token
        place, _, name = tag.partition("-")
        kind = _KINDS.get(name.partition(".")[0].upper(), name.upper())
        if place in ("I", "M", "E") and spans and spans[-1][2] == kind:
            spans[-1] = (spans[-1][0], len(text), kind)
        elif name:
            spans.append((start, len(text), kind))
    return text, spans


def _sets() -> dict[str, Callable[[], list[Text]]]:
    found: dict[str, Callable[[], list[Text]]] = {
        "prose zh": lambda: _prose("zh"),
        "prose en": lambda: _prose("en"),
        "samples": _samples,
        "generated": _generated,
    }
    folder = os.environ.get("SLLM_PRIVACY_SETS")
    for path in sorted(Path(folder).iterdir()) if folder else ():
        reader = {".jsonl": _json_lines, ".bio": _bio}.get(path.suffix)
        if reader is not None:
            found[path.stem] = lambda reader=reader, path=path: reader(path)  # type: ignore[misc]
    return found


SETS = _sets()


# ---- what is found -----------------------------------------------------------------------------------------


def _count(texts: list[Text], used: list[Detector], report_values: Report, name: str) -> None:
    total: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    n_clean = n_touched = 0
    for text, spans in texts:
        found = [one for each in used for one in each.detect(text)]
        inside = {at for one in found for at in range(one.start, one.end)}
        for start, end, kind in spans:
            total[kind] += 1
            hit[kind] += all(at in inside or not text[at].isalnum() for at in range(start, end))
        if not spans:
            n_clean += 1
            n_touched += bool(found)
    recall = {kind: round(hit[kind] / n, 3) for kind, n in sorted(total.items())}
    clean = {"clean touched": round(n_touched / n_clean, 3)} if n_clean else {}
    report_values({"set": name, "n": sum(total.values()), **recall, **clean}, {})


@pytest.mark.parametrize("detectors", ["patterns", "default", "places too"])
@pytest.mark.parametrize("name", SETS)
def test_recall(benchmark: Benchmark, report_values: Report, name: str, detectors: str) -> None:
    used: list[Detector] = [PatternDetector(), NameDetector()]
    if detectors != "patterns":
        if lac.installed() is None or census.installed() is None:
            pytest.skip("needs the extra names")
        used = list(default_detectors())
    if detectors == "places too":
        used.append(TaggerDetector(("ORG", "PLACE")))
    texts = SETS[name]()
    benchmark.pedantic(
        lambda: _count(texts, used, report_values, name),
        setup=lambda: None,
        rounds=1,
        iterations=1,
        warmup_rounds=0,
    )


# ---- how fast ----------------------------------------------------------------------------------------------


def _scan(x: npt.NDArray[Any], parts: tuple[npt.NDArray[Any], ...], backward: bool) -> npt.NDArray[Any]:
    weights, bias, gates, candidate = parts
    width = candidate.shape[0]
    sums = x @ weights + bias
    state = np.zeros(width, np.float32)
    states = np.empty((len(x), width), np.float32)
    for t in range(len(x) - 1, -1, -1) if backward else range(len(x)):
        both = 1 / (1 + np.exp(-(sums[t, : 2 * width] + state @ gates)))
        new = np.tanh(sums[t, 2 * width :] + (both[width:] * state) @ candidate)
        state = state + both[:width] * (new - state)
        states[t] = state
    return states


def _in_numpy(weights: taggers.Weights) -> Callable[[str], list[int]]:
    """The same tagger in float32 NumPy, matrices transposed once."""
    layers = [
        [
            tuple(map(np.ascontiguousarray, (a.T, bias, c[: 2 * c.shape[1]].T, c[2 * c.shape[1] :].T)))
            for a, bias, c in layer
        ]
        for layer in weights.layers
    ]
    start, end, between = weights.crf

    def run(text: str) -> list[int]:
        x = weights.embd[[weights.rows.get(ord(char), weights.unknown) for char in text]]
        for forward, backward in layers:
            x = np.concatenate([_scan(x, forward, False), _scan(x, backward, True)], axis=1)
        said = x @ weights.out.T + weights.out_bias
        score, came = start + said[0], []
        for row in said[1:]:
            paths = score[:, None] + between
            came.append(paths.argmax(axis=0))
            score = paths.max(axis=0) + row
        path = [int((score + end).argmax())]
        for back in reversed(came):
            path.append(int(back[path[-1]]))
        return path[::-1]

    return run


@pytest.mark.parametrize("together", [False, True], ids=["one sentence", "all sentences"])
def test_tagger_speed(benchmark: Benchmark, report_values: Report, tmp_path: Path, together: bool) -> None:
    """A tagger of LAC's shape with random weights: no less work than with its own."""
    weights = taggers.random_weights(1, n_embd=128, n_units=128, n_layers=2, n_labels=57)
    tagger = Tagger(taggers.write(tmp_path / "tagger.gguf", *taggers.contents(weights)))
    texts = [text for text, _ in _prose("zh")]
    n_chars = sum(map(len, texts))
    peer = _in_numpy(weights)

    def ours() -> Iterator[float]:
        for _ in range(5):
            begun = time.process_time()
            if together:
                tagger.run("".join(texts), [len(text) for text in texts])
            else:
                for text in texts:
                    tagger.run(text, [len(text)])
            yield time.process_time() - begun

    begun = time.process_time()
    labels = [peer(text) for text in texts]
    numpy_seconds = time.process_time() - begun
    assert sum(map(len, labels)) == n_chars
    seconds: list[float] = []
    benchmark.pedantic(
        lambda: seconds.extend(ours()), setup=lambda: None, rounds=1, iterations=1, warmup_rounds=0
    )
    us = 1e6 * min(seconds) / n_chars
    report_values(
        {"us_per_char": us, "us_per_char in NumPy": 1e6 * numpy_seconds / n_chars},
        {f"at most {US_PER_CHAR:g} us a character": us <= US_PER_CHAR},
    )
