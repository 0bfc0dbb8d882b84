"""``sllm ask``: an answer by the model that suits the request, and an account of what left the machine."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sllm
from sllm import embedded
from sllm.cli.addresses import engine_key, worker_addresses
from sllm.cli.arguments import (
    DEFAULT,
    ENGINE,
    ENGINE_SECRET,
    MODEL,
    URI,
    add_engine_model,
    add_threads,
    whole,
)
from sllm.cli.console import CommandError, count, one_line, read_prompt
from sllm.cli.run_report import style_of
from sllm.engine.chat_template import thinking_off
from sllm.triage.calibration import Profile
from sllm.triage.hybrid import Hybrid
from sllm.triage.openai_cloud import OpenAICloud
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import Triage

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.targets.base import Target
    from sllm.triage.hybrid import Answer, ChatCloud

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    "Without --small the package's own model grades and answers, with the profile that comes with it."
    " Without a profile nothing is promised, and every request is tier 2. The key for --cloud-url is taken"
    f" from OPENAI_API_KEY. {ENGINE_SECRET} A worker's sllm:// line is a secret, too, and @FILE or"
    " SLLM_REMOTE keep it from the machine's other users. Where the cloud does not answer, a line on stderr"
    " says so, and the local model answers."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm ask``."""
    add = parser.add_argument
    # Any number of words, so that the ones of a prompt without quotes are not repeated by argparse's error.
    add("prompt", metavar="PROMPT", nargs="*", help="the request; '-', or none and a pipe: stdin")
    add("--system", metavar="TEXT", help="a system message before it")
    _add_models(parser)
    _add_cloud(parser)
    add("-n", "--max-tokens", metavar="N", type=whole(1), default=512, help="of the answer (default: 512)")
    # A profile is made of answers at temperature 0, and promises nothing of others.
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="what a profile promises holds at 0 (default: 0)",
    )
    add(
        "--no-thinking",
        action="store_true",
        help="answer without reasoning first, where a model's template has a switch for that (not for"
        " --cloud-url)",
    )
    add("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    add("--n-ctx", metavar="N", type=whole(1), help="positions of the contexts here")
    add_threads(parser, models=2)
    add(
        "--explain",
        action="store_true",
        help="say on stderr who answered, why, and what was masked: kinds and counts, never values",
    )
    add("--json", action="store_true", help="answer and account as a JSON object")


def _add_models(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument(
        "--small",
        metavar="GGUF",
        help=f"grades, and answers tier 1: {MODEL} (default: the package's own)",
    )
    models.add_argument(
        "--local",
        metavar="GGUF",
        help="answers tier 2, and what must not leave this machine (default: --small)",
    )
    models.add_argument("--profile", metavar="FILE", help="what sllm calibrate found of --small")


def _add_cloud(parser: argparse.ArgumentParser) -> None:
    cloud = parser.add_argument_group("cloud")
    cloud.add_argument("--remote", metavar="URI", nargs="?", const="", help=f"a worker: {URI}")
    cloud.add_argument(
        "--cloud-url", metavar="URL", help="an OpenAI-compatible endpoint, such as https://host/v1"
    )
    cloud.add_argument("--cloud-model", metavar="NAME", help="the model's name there")
    cloud.add_argument("--engine", metavar="URL", help=ENGINE)
    cloud.add_argument(
        "--engine-vocab",
        metavar="GGUF",
        help=f"a model with its vocabulary and chat template: {MODEL} (default: --local, or else --small)",
    )
    add_engine_model(cloud)
    cloud.add_argument(
        "--privacy",
        choices=("local", "deidentify", "refuse"),
        default="local",
        help="local: nothing of a private request leaves; deidentify: what was found in it is masked before"
        " it leaves, and put back in the answer; refuse: as local, and an error where only the cloud could"
        f" answer {DEFAULT}",
    )
    cloud.add_argument(
        "--verify",
        choices=("always", "uncertain", "never"),
        default="uncertain",
        help=f"which answers of tier 2 the cloud verifies {DEFAULT}",
    )
    cloud.add_argument(
        "--max-cloud-tokens",
        metavar="N",
        type=whole(1),
        help="send and receive no more (default: any number)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm ask``."""
    sampling = sllm.SamplingParams(temperature=args.temperature, seed=args.seed)
    _check_cloud(args)
    uris = None if args.remote is None else worker_addresses(args.remote)
    messages = [] if args.system is None else [{"role": "system", "content": _encodable(args.system)}]
    option = "--small" if args.small is None and args.local is None else None
    messages.append({"role": "user", "content": _prompt(args.prompt, option)})
    with ExitStack() as stack:
        # What can be refused at once is refused before the models are loaded.
        profile = None if args.profile is None else Profile.load(args.profile)
        cloud, trouble = _open_cloud(args, uris, out, stack)
        small, triage = _open_small(args, profile, stack)
        local = None if args.local is None else stack.enter_context(sllm.Model(args.local))
        if args.engine is not None:
            cloud, trouble = _open_engine(args, local or small, out, stack)
        if args.no_thinking:
            _check_switch(small, local, cloud)
        hybrid = stack.enter_context(
            Hybrid(
                small,
                local,
                cloud,
                triage=triage,
                privacy=args.privacy,
                verify=args.verify,
                sampling=sampling,
                max_tokens=args.max_tokens,
                max_cloud_tokens=args.max_cloud_tokens,
                n_ctx=args.n_ctx,
                n_threads=args.threads,
                thinking=not args.no_thinking,
            )
        )
        answer = stack.enter_context(hybrid.ask(messages))
        if trouble is not None:
            answer.reasons.append(trouble)
        parts = []
        for part in answer:
            if args.json:
                parts.append(part.text)
            else:
                out.text(part.text, style=style_of(part))
        if args.json:
            out.line(json.dumps(_account(answer, "".join(parts)), ensure_ascii=False))
        else:
            out.end_line()
        for reason in answer.reasons:
            if "does not answer" in reason and reason != trouble:  # said already when it was met
                out.note(f"sllm: {reason}")
        if args.explain:
            for line in explained(answer):
                out.note(line)
    return 0


def _prompt(words: list[str], model_option: str | None) -> str:
    prompt = _encodable(read_prompt(words, "ask", model_option=model_option))
    if not prompt.strip():
        raise CommandError("the request is empty")
    return prompt


def _encodable(text: str) -> str:
    """``text``, if it can be written as UTF-8: a shell may pass other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"the request is not UTF-8, from character {error.start} on") from None
    return text


# ---- the models


def _check_cloud(args: argparse.Namespace) -> None:
    if args.engine is None and (args.engine_vocab is not None or args.engine_model is not None):
        raise CommandError("--engine-vocab and --engine-model need --engine, the address of the engine")
    if sum(given is not None for given in (args.remote, args.cloud_url, args.engine)) > 1:
        raise CommandError("--remote, --cloud-url and --engine exclude each other")
    if args.cloud_url is None:
        if args.cloud_model is not None:
            raise CommandError("--cloud-model needs --cloud-url, which says where the model is")
        return
    if args.cloud_model is None:
        raise CommandError("--cloud-url needs --cloud-model, the model's name there")
    try:
        found = urlsplit(args.cloud_url)
        good = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:
        good = False
    if not good:
        raise CommandError("--cloud-url is not an address, expected one such as https://host/v1")
    if found.username is not None:
        raise CommandError("--cloud-url holds a user or a key; leave it out, and set OPENAI_API_KEY")


def _check_switch(*models: object) -> None:
    """Whether one of the models, or of the targets, has a switch for reasoning."""
    if not any(thinking_off(getattr(model, "chat_template", None)) for model in models):
        raise CommandError("--no-thinking: no model's chat template has a switch for reasoning that is known")


def _open_small(
    args: argparse.Namespace, profile: Profile | None, stack: ExitStack
) -> tuple[sllm.Model, Triage]:
    """The small model, and the triage by it."""
    ours = args.small is None
    small = stack.enter_context(sllm.Model(embedded.TARGET if ours else args.small))
    scorer = stack.enter_context(ContextScorer(small, n_threads=args.threads))
    if ours and profile is None:
        profile = Profile.load(embedded.TARGET_PROFILE)
    # Our own model is too small to judge privacy: there the detectors decide alone.
    return small, Triage(scorer, Policy(ask_privacy=not ours), profile)


def _open_cloud(
    args: argparse.Namespace, uris: list[str] | None, out: Output, stack: ExitStack
) -> tuple[Target | ChatCloud | None, str | None]:
    """The cloud, and why there is none although one was named."""
    if args.cloud_url is not None:
        try:
            cloud = OpenAICloud(args.cloud_model, base_url=args.cloud_url)
        except ImportError as error:
            raise CommandError(str(error)) from None
        return stack.enter_context(cloud), None
    if uris is None:
        return None, None
    try:
        return stack.enter_context(sllm.connect(uris)).target(), None
    except sllm.AuthError:
        raise  # a wrong token, or a wrong worker: neither goes away by itself
    except sllm.RemoteError as error:
        # What can be answered here does not need it.
        out.note(f"sllm: {one_line(error)}; answering without it")
        return None, "the worker does not answer"


def _open_engine(
    args: argparse.Namespace, vocab: sllm.Model, out: Output, stack: ExitStack
) -> tuple[Target | None, str | None]:
    """The engine as the cloud, and why there is none although one was named."""
    if args.engine_vocab is not None:
        vocab = stack.enter_context(sllm.Model(args.engine_vocab, vocab_only=True))
    try:
        target = sllm.EngineTarget(args.engine, vocab, model=args.engine_model, api_key=engine_key())
    except sllm.AuthError:
        raise
    except sllm.RemoteError as error:
        out.note(f"sllm: {one_line(error)}; answering without it")
        return None, "the engine does not answer"
    return stack.enter_context(target), None


# ---- output


def _account(answer: Answer, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "tier": int(answer.grade.tier),
        "route": answer.route,
        "reasons": answer.reasons,
        "masked": answer.masked,
        "stats": asdict(answer.stats),
    }


def explained(answer: Answer) -> list[str]:
    """Who answered and why, for people: kinds, counts and numbers."""
    grade, stats = answer.grade, answer.stats
    masked = ", ".join(f"{kind} {n}" for kind, n in sorted(answer.masked.items()))
    lines = [
        f"tier: {int(grade.tier)} (easy {grade.p_easy:.2f}, hard {grade.p_hard:.2f})",
        f"privacy: {grade.privacy}",
        f"reasons: {one_line('; '.join(answer.reasons))}",
        f"route: {' > '.join(answer.route)}",
        f"masked: {masked or 'nothing'}",
        f"cloud: {count(stats.cloud_in, 'token')} sent, {stats.cloud_out} received",
    ]
    if stats.n_checked:
        lines.append(f"verified: {stats.n_kept} of {count(stats.n_checked, 'token')} stood")
    if stats.n_restored:
        lines.append(f"restored: {count(stats.n_restored, 'placeholder')}")
    if stats.n_in_links:
        lines.append(f"not restored in links: {count(stats.n_in_links, 'placeholder')}")
    lines.append(f"time: {stats.seconds:.2f} s, {stats.grade_seconds:.2f} s of it for the grade")
    return lines
