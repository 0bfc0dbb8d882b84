"""``sllm calibrate``: labelled requests in, a profile for one model file out, with a table and a plot."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sllm
from sllm.cli.arguments import MODEL, add_threads, share, whole
from sllm.cli.console import CommandError, Progress, count, one_line, table
from sllm.cli.labelled import FORMAT, check_references, read_labelled
from sllm.cli.plot import Axis, Curve, Panel, figure, ticks
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
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.cli.console import Output
    from sllm.cli.labelled import LabelledRequest
    from sllm.triage.calibration import Evaluation, Profile, Threshold

__all__ = ["EPILOG", "add_arguments", "plot", "run"]

EPILOG = FORMAT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm calibrate``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
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
        type=share,
        default=0.05,
        help="the largest share of wrong answers in tier 1 (default: %(default)s)",
    )
    add(
        "--verify-alpha",
        metavar="A",
        type=share,
        help="the largest share of wrong ones among the answers of tier 2 that nobody verifies (default: as"
        " --alpha)",
    )
    add(
        "--delta",
        metavar="D",
        type=share,
        default=0.05,
        help="the probability that the rows mislead about it (default: %(default)s)",
    )
    add(
        "--hard-alpha",
        metavar="A",
        type=share,
        default=0.2,
        help="the largest share of requests that are not hard in tier 3 (default: %(default)s)",
    )
    add("--seed", metavar="N", type=whole(0), default=0, help="of the split of the rows (default: 0)")
    add("--plot", metavar="SVG", help="draw error against coverage")
    add("--max-tokens", metavar="N", type=whole(1), default=256, help="of an answer (default: 256)")
    add_threads(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm calibrate``."""
    labelled = read_labelled(Path(args.rows))
    if args.local is not None:
        check_references(labelled, args.rows)
    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(args.model))
        local = model if args.local is None else stack.enter_context(sllm.Model(args.local))
        scorer = stack.enter_context(ContextScorer(model, n_threads=args.threads))
        triage = Triage(scorer, Policy(timeout=None))  # nobody waits for one of these grades
        out.note(f"sllm: scoring {count(len(labelled), 'row')} with {model.path.name}")
        rows, answers = _score(labelled, triage, scorer, local, args, stack, out)
        options = {
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
            **options,
        )
        local_id, local_name = local.id, local.path.name
    evaluations = [("", evaluate(rows, **options))]
    verify_alpha = None
    if answers is not None:
        verify_alpha = args.verify_alpha or args.alpha
        profile = calibrate_verify(profile, rows, answers, model_id=local_id, alpha=args.verify_alpha)
        verified = evaluate_verify(profile, rows, answers, alpha=args.verify_alpha)
        evaluations.append((f"tier 2, answered by {local_name}", verified))
    profile.save(args.output)
    if args.plot is not None:
        Path(args.plot).write_text(plot(evaluations[0][1], args.alpha), encoding="utf-8")
    for what, evaluation in evaluations:
        if what:
            out.line(f"\n{what}: {count(evaluation.n, 'row')}, {_percent(evaluation.error)} wrong")
        for line in table(evaluation.rows(), right=(1, 2, 3, 4)):
            out.line(line)
    out.line()
    for line in _statements(profile, evaluations[0][1], verify_alpha):
        out.line(line)
    return 0


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _score(
    labelled: Sequence[LabelledRequest],
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

    def answered(one: LabelledRequest, by: sllm.Model) -> tuple[npt.NDArray[np.float64] | None, bool]:
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
    with Progress(out, f"scoring {count(len(labelled), 'row')}") as progress:
        for n, one in enumerate(labelled):
            progress(n / len(labelled))
            with _located(f"{args.rows}, line {one.line}"):
                logprobs, right = answered(one, model)
                rows.append(triage.row(one.messages, correct=right, answer_logprobs=logprobs, hard=one.hard))
                if local is not model:
                    logprobs, right = answered(one, local)
                if logprobs is not None:
                    answers.append((confidence(logprobs), right))
    return rows, answers if len(answers) == len(rows) else None


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except (CalibrationError, ValueError, TypeError, sllm.ContextFullError) as error:
        raise CommandError(f"{where}: {error}") from error


def _folded(text: str) -> str:
    """A text without the differences that do not matter between answers: case, spaces, the last full stop."""
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
        promise = _promise(profile.verify, "of its answers need no verification", "wrong", sure)
        lines.append(f"tier 2: {promise}")
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
    curves = []
    for one in shown:
        proved = [] if one.threshold is None else [(one.threshold.coverage, one.threshold.error)]
        points = [(coverage, error) for coverage, error in one.curve if coverage >= least]
        curves.append(Curve(one.name, _COLOURS[one.name], points, proved, f"{one_line(one.name)}: proved"))
    panel = Panel(
        *(60, 20, 620, 350),
        x=Axis("coverage: the surest requests", 1, [(i / 5, f"{i / 5:.0%}") for i in range(6)]),
        y=Axis("share of wrong answers among them", top, [(tick, f"{tick:.3g}") for tick in ticks(top)]),
        curves=curves,
        limit=(alpha, f"alpha {alpha:g}"),
    )
    return figure(640, 400, [panel])
