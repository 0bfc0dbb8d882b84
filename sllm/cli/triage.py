"""``sllm calibrate``: labelled requests in, a profile for one model file out, with a table and a plot."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.console import CommandError, count, one_line, table
from sllm.engine import gguf
from sllm.triage.calibration import (
    CalibrationError,
    Row,
    calibrate,
    calibrate_verify,
    confidence,
    evaluate,
    evaluate_verify,
)
from sllm.triage.check_answer import answer_logprobs
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import SIGNALS, Triage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.cli.console import Output
    from sllm.triage.calibration import Evaluation, Measured, Profile, Threshold

__all__ = ["FORMAT", "add_arguments", "calibrate_command", "plot"]

FORMAT = (
    'Each line of ROWS is a JSON object: "prompt" (a text) or "messages" (role and content); then either'
    ' "correct" (true or false: was MODEL\'s own answer right?), with "answer" (that answer) or without, or'
    ' "reference" (a right answer, or a list of them, empty if MODEL can have none): MODEL then answers at'
    " temperature 0 and is right if it says the same but for case, spaces and the full stop at the end; and,"
    ' if you like, "label" ("easy", "medium" or "hard": hard requests go straight to the cloud). With --local'
    " every row needs a reference, for that model answers, too. The rows must be drawn like the requests of"
    " later use, each on its own: the promise holds for no others."
)

_FIELDS = {"prompt", "messages", "correct", "answer", "reference", "label"}
_LABELS = ("easy", "medium", "hard")


def add_arguments(
    parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]], model: str
) -> None:
    """The arguments of ``sllm calibrate``; ``whole`` makes a type for whole numbers from a lowest one."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=model)
    add("rows", metavar="ROWS", help="labelled requests, JSON lines")
    add(
        "--local",
        metavar="LOCAL",
        help="the GGUF that is to answer tier 2, as in sllm ask --local (default: MODEL itself)",
    )
    add("-o", "--output", metavar="FILE", required=True, help="where the profile goes")
    add(
        "--alpha",
        metavar="A",
        type=_share,
        default=0.05,
        help="the largest share of wrong answers in tier 1 (default: %(default)s)",
    )
    add(
        "--verify-alpha",
        metavar="A",
        type=_share,
        help="the largest share of wrong ones among the answers of tier 2 that nobody verifies (default: as"
        " --alpha)",
    )
    add(
        "--delta",
        metavar="D",
        type=_share,
        default=0.05,
        help="the probability that the rows mislead about it (default: %(default)s)",
    )
    add(
        "--hard-alpha",
        metavar="A",
        type=_share,
        default=0.2,
        help="the largest share of requests that are not hard in tier 3 (default: %(default)s)",
    )
    add("--seed", metavar="N", type=whole(0), default=0, help="of the split of the rows (default: 0)")
    add("--plot", metavar="SVG", help="draw error against coverage")
    add("--max-tokens", metavar="N", type=whole(1), default=256, help="of an answer (default: 256)")
    add("--threads", metavar="N", type=whole(1), help="CPU threads (default: all cores)")


def _share(text: str) -> float:
    import argparse

    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, expected more than 0 and less than 1")
    return value


def calibrate_command(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm calibrate``."""
    labelled = _read(Path(args.rows))
    if args.local is not None:
        _check_references(labelled, args.rows)
    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(args.model))
        local = model if args.local is None else stack.enter_context(sllm.Model(args.local))
        scorer = stack.enter_context(ContextScorer(model, n_threads=args.threads))
        triage = Triage(scorer, Policy(timeout=None))  # nobody waits for one of these grades
        out.note(f"sllm: scoring {count(len(labelled), 'row')} with {model.path.name}")
        rows, answers = _score(labelled, triage, scorer, local, args, stack, out)
        asked = {
            "signals": SIGNALS,
            "alpha": args.alpha,
            "delta": args.delta,
            "hard_alpha": args.hard_alpha,
            "seed": args.seed,
        }
        profile = calibrate(
            rows,
            model_id=scorer.model_id,
            template_id=scorer.template_id,
            policy_id=triage.policy.id,
            **asked,
        )
        local_id, local_name = gguf.model_id(local.path), local.path.name
    evaluations = [evaluate(rows, **asked)]
    if answers is not None:
        profile = calibrate_verify(profile, rows, answers, model_id=local_id, alpha=args.verify_alpha)
        evaluations.append(evaluate_verify(profile, rows, answers, alpha=args.verify_alpha))
    profile.save(args.output)
    if args.plot is not None:
        Path(args.plot).write_text(plot(evaluations[0], args.alpha), encoding="utf-8")
    for evaluation, what in zip(evaluations, ("", f"tier 2, answered by {local_name}"), strict=False):
        if what:
            out.line(f"\n{what}: {count(evaluation.n, 'row')}, {_share_of(evaluation.error)} wrong")
        for line in table(evaluation.rows(), right=(1, 2, 3, 4)):
            out.line(line)
    out.line()
    verify_alpha = (args.verify_alpha or args.alpha) if answers is not None else None
    for line in _statements(profile, evaluations[0], verify_alpha):
        out.line(line)
    return 0


def _share_of(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _check_references(labelled: Sequence[_Labelled], path: str) -> None:
    for one in labelled:
        if one.references is None:
            raise CommandError(
                f"{path}, line {one.line}: with --local a row needs a reference, by which that model's answer"
                " is judged, and this one has correct"
            )


# ---- labelled requests


@dataclass(frozen=True)
class _Labelled:
    """A line of the file."""

    line: int
    messages: list[dict[str, Any]]
    correct: bool | None
    answer: str | None
    references: list[str] | None
    hard: bool | None


def _read(path: Path) -> list[_Labelled]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    lines = enumerate(text.split("\n"), 1)
    rows = [_labelled(line, f"{path}, line {number}", number) for number, line in lines if line.strip()]
    if not rows:
        raise CommandError(f"{path} is empty, expected labelled requests, JSON lines")
    return rows


def _labelled(line: str, where: str, number: int) -> _Labelled:
    def fail(what: str) -> CommandError:
        return CommandError(f"{where}: {what} (see sllm calibrate --help)")

    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise fail(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise fail(f"a {type(found).__name__}, expected an object")
    unknown = sorted(set(found) - _FIELDS)
    if unknown:
        raise fail(f"the unknown field {unknown[0]!r}, expected {', '.join(sorted(_FIELDS))}")
    messages = found.get("messages")
    if ("prompt" in found) == ("messages" in found):
        raise fail("expected either prompt or messages")
    if "prompt" in found:
        if not isinstance(found["prompt"], str):
            raise fail(f"prompt is {found['prompt']!r}, expected a text")
        messages = [{"role": "user", "content": found["prompt"]}]
    if not isinstance(messages, list):
        raise fail(f"messages is {messages!r}, expected a list")
    correct, answer, reference = (found.get(name) for name in ("correct", "answer", "reference"))
    if (correct is None) == (reference is None):
        raise fail("expected either correct or reference")
    if correct is not None and not isinstance(correct, bool):
        raise fail(f"correct is {correct!r}, expected true or false")
    if answer is not None and (not isinstance(answer, str) or reference is not None):
        raise fail("answer is MODEL's own answer, a text, beside correct")
    references = [reference] if isinstance(reference, str) else reference
    if references is not None and not (
        isinstance(references, list) and all(isinstance(one, str) for one in references)
    ):
        raise fail(f"reference is {reference!r}, expected a text or a list of texts")
    label = found.get("label")
    if label is not None and label not in _LABELS:
        raise fail(f"label is {label!r}, expected {', '.join(_LABELS)}")
    hard = None if label is None else label == "hard"
    return _Labelled(number, messages, correct, answer, references, hard)


def _score(
    labelled: Sequence[_Labelled],
    triage: Triage,
    scorer: ContextScorer,
    local: sllm.Model,
    args: argparse.Namespace,
    stack: ExitStack,
    out: Output,
) -> tuple[list[Row], list[tuple[float, bool]] | None]:
    """Grade every request, and answer those that come with a right answer.

    Returns the rows, and the confidence and rightness of the local main model's answer to each; None where
    there are not all of them.
    """
    model = scorer.model
    targets: dict[sllm.Model, sllm.LocalTarget] = {}
    if any(one.references is not None for one in labelled):
        targets = {
            one: stack.enter_context(sllm.LocalTarget(one, n_threads=args.threads))
            for one in dict.fromkeys((model, local))
        }

    def answered(one: _Labelled, by: sllm.Model) -> tuple[npt.NDArray[np.float64] | None, bool]:
        """The log-probabilities of the answer's tokens, and whether it is right."""
        if one.references is None:
            given = None if one.answer is None else scorer.answer_logprobs(one.messages, one.answer)
            return given, bool(one.correct)
        # As Hybrid answers and looks at the answer, or the thresholds would be those of something else.
        target, prompt = targets[by], by.chat(one.messages)
        greedy = sllm.SamplingParams(temperature=0)
        with sllm.generate(target, prompt, sampling=greedy, max_tokens=args.max_tokens) as stream:
            runs = list(stream)
        written = [token for run in runs for token in run.tokens]
        right = _folded("".join(run.text for run in runs)) in map(_folded, one.references)
        return answer_logprobs(target, prompt, written), right

    rows, answers = [], []
    for n, one in enumerate(labelled):
        out.status(f"{n} of {len(labelled)} rows")
        with _named(f"{args.rows}, line {one.line}"):
            logprobs, right = answered(one, model)
            rows.append(triage.row(one.messages, correct=right, answer_logprobs=logprobs, hard=one.hard))
            if local is not model:
                logprobs, right = answered(one, local)
            if logprobs is not None:
                answers.append((confidence(logprobs), right))
    out.status("")
    return rows, answers if len(answers) == len(rows) else None


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except (CalibrationError, ValueError, TypeError, sllm.ContextFullError) as error:
        raise CommandError(f"{where}: {error}") from error


def _folded(text: str) -> str:
    """A text without what does not make an answer another."""
    return " ".join(text.split()).casefold().rstrip(".。!！")


# ---- what is shown


def _statements(profile: Profile, evaluation: Evaluation, verify_alpha: float | None) -> list[str]:
    sure = f"{1 - profile.delta:.0%} confidence"
    lines = [f"rows: {profile.n}, {evaluation.n} of them for testing; wrong: {evaluation.error:.1%} of those"]
    if profile.tier1 is None:
        lines.append(
            f"tier 1: never; no threshold is shown to keep errors at {profile.alpha:.1%} with {sure}"
        )
    else:
        lines.append(f"tier 1: {_promise(profile.tier1, 'of the requests', 'wrong', sure)}")
    if verify_alpha is None:
        lines.append("tier 2: every answer is to be verified; not every row has an answer")
    elif profile.verify is None:
        lines.append(
            "tier 2: every answer is to be verified; no confidence is shown to keep errors at"
            f" {verify_alpha:.1%} with {sure}"
        )
    else:
        told = _promise(profile.verify, "of its answers need no verification", "wrong", sure)
        lines.append(f"tier 2: {told}")
    if profile.hard is None:
        lines.append('tier 3: never; no row has the label "hard"')
    elif profile.tier3 is None:
        lines.append("tier 3: never; no threshold is shown to find hard requests with so few others")
    else:
        lines.append(f"tier 3: {_promise(profile.tier3, 'of the requests', 'not hard', sure)}")
    return [*lines, f"profile: {profile.id}"]


def _promise(t: Threshold, of: str, what: str, sure: str) -> str:
    found = f"{t.n_wrong} of {t.n_passed} were"
    return f"{t.coverage:.1%} {of}, at most {t.bound:.1%} of them {what} with {sure} ({found})"


_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 60, 20, 20, 50
_COLOURS = {"grade": "#1f77b4", "answer's confidence": "#2ca02c", "length alone (control)": "#999999"}


def plot(evaluation: Evaluation, alpha: float) -> str:
    """Error against coverage, as SVG: one line for each score, a dashed one for alpha, a dot where a
    threshold is proved.
    """
    shown = [one for one in evaluation.scores if one.curve and one.name in _COLOURS]
    # The surest few are noise: a single wrong one among them would set the scale.
    least = 10 / max(evaluation.n, 1)
    errors = [error for one in shown for coverage, error in one.curve if coverage >= least]
    top = min(1.0, max([2 * alpha, evaluation.error, *errors]) * 1.1)

    def x(coverage: float) -> float:
        return _LEFT + coverage * (_WIDTH - _LEFT - _RIGHT)

    def y(error: float) -> float:
        return _TOP + (1 - min(error, top) / top) * (_HEIGHT - _TOP - _BOTTOM)

    def text(at_x: float, at_y: float, words: str, more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}"{more}>{words}</text>'

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
            f' viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{x(0):.1f} {y(top):.1f}V{y(0):.1f}H{x(1):.1f}" fill="none" stroke="black"/>',
    ]
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 6)
    parts += [text(x(i / 5), y(0) + 18, f"{i / 5:.0%}", ' text-anchor="middle"') for i in range(6)]
    ticks = [i * step for i in range(int(top / step) + 1)]
    parts += [text(x(0) - 6, y(tick) + 4, f"{tick:.3g}", ' text-anchor="end"') for tick in ticks]
    middle = (x(0) + x(1)) / 2
    parts.append(text(middle, _HEIGHT - 10, "coverage: the surest requests", ' text-anchor="middle"'))
    turned = f' text-anchor="middle" transform="rotate(-90 15 {_HEIGHT / 2})"'
    parts.append(text(15, _HEIGHT / 2, "share of wrong answers among them", turned))
    dash = 'stroke="#d62728" stroke-dasharray="5 4"'
    parts.append(f'<path d="M{x(0):.1f} {y(alpha):.1f}H{x(1):.1f}" {dash}/>')
    parts.append(text(x(1), y(alpha) - 5, f"alpha {alpha:g}", ' text-anchor="end" fill="#d62728"'))
    for place, one in enumerate(shown):
        parts += _line(one, [(x(c), y(e)) for c, e in one.curve if c >= least], x, y)
        parts.append(text(_LEFT + 12, _TOP + 14 + 16 * place, one.name, f' fill="{_COLOURS[one.name]}"'))
    return "\n".join([*parts, "</svg>", ""])


def _line(
    one: Measured,
    points: Sequence[tuple[float, float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[str]:
    colour = _COLOURS[one.name]
    parts = []
    if points:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    if one.threshold is not None:
        at = f'cx="{x(one.threshold.coverage):.1f}" cy="{y(one.threshold.error):.1f}"'
        title = f"<title>{one_line(one.name)}: proved</title>"
        parts.append(f'<circle {at} r="4" fill="{colour}">{title}</circle>')
    return parts
