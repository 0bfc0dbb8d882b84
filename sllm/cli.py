"""The command line: ``sllm demo``, ``sllm run``, ``sllm devices``, ``sllm inspect``.

Text goes to stdout as it comes; everything about it goes to stderr. An error is one line there and exit
status 2, Ctrl-C is exit status 130 within a second, and a reader that goes away (``sllm run ... | head -1``)
ends the program without a word.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import sllm
from sllm import embedded
from sllm.drafters import ModelDrafter
from sllm.model import devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.generation import GenerationStats, Run, TextStream

__all__ = ["main"]

_FAILED = 2
_DIFFERS = 1
_INTERRUPTED = 128 + signal.SIGINT
_READER_GONE = 128 + signal.SIGPIPE

_GRACE_SECONDS = 0.7
"""How long a Ctrl-C may take to end the program in good order."""

_EXACT: dict[str, Any] = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}
"""With these a q8_0 model's text does not depend on the draft to the last bit (see LocalTarget)."""

_DEMO_PROMPT = "Tell me a short story about a little fox called Oscar who makes a wish."

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"

# What a model or a file says must not drive the terminal that shows it.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class _CommandError(sllm.SllmError):
    """What was asked on the command line cannot be done."""


class _WriteError(Exception):
    """Stdout does not take any more."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.reader_gone = error.errno == errno.EPIPE
        self.reason = error.strerror or str(error)


class _Output:
    """The one place that writes: the answer to stdout, at once, and notes of one line to stderr."""

    def __init__(self) -> None:
        # Where a descriptor was closed by the caller (`>&-`), Python has None.
        self._out: TextIO | None = sys.stdout
        self._err: TextIO | None = sys.stderr
        if isinstance(self._out, io.TextIOWrapper):
            self._out.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
        self.terminal = self._out is not None and self._out.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._line_open = False

    def text(self, text: str, *, style: str = "") -> None:
        """Write to stdout; ``style`` is a terminal's escape sequence, used only where colours are wanted.

        Raises _WriteError where stdout is closed, full, or its reader is gone.
        """
        if not text or self._out is None:
            return
        if self.terminal:
            text = text.translate(_CONTROLS)
        self._line_open = not text.endswith("\n")
        if style and self.colour:
            text = f"{style}{text}{_RESET}"
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            self.give_up()
            raise _WriteError(error) from error

    def line(self, text: str = "") -> None:
        """Write a line to stdout."""
        self.text(f"{text}\n")

    def end_line(self) -> None:
        """End the line that is open on stdout, if one is."""
        if self._line_open:
            self.line()

    def note(self, text: str) -> None:
        """Write to stderr; nobody can be told when that fails."""
        if self._err is not None:
            with suppress(OSError, ValueError):
                self._err.write(f"{text}\n")
                self._err.flush()

    def flush(self) -> None:
        """Let go what others left in stdout's buffer; raises as :meth:`text` does."""
        try:
            if self._out is not None:
                self._out.flush()
        except OSError as error:
            self.give_up()
            raise _WriteError(error) from error

    def give_up(self) -> None:
        """Write to nowhere from now on, or the interpreter would try once more at its end, and complain."""
        out, self._out = self._out, None
        with suppress(OSError, ValueError):
            if out is not None:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, out.fileno())
                os.close(nowhere)


class _Notes(logging.Handler):
    """Shows the library's warnings as notes; llama.cpp's own only to who debugs."""

    def __init__(self, out: _Output, *, debug: bool) -> None:
        super().__init__(logging.INFO if debug else logging.WARNING)
        self._out = out
        self._debug = debug

    def emit(self, record: logging.LogRecord) -> None:
        if self._debug or not record.name.startswith("sllm.llama_cpp"):
            self._out.note(f"sllm: {record.levelname.lower()}: {_one_line(record.getMessage())}")


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_FAILED, f"sllm: {_one_line(message)} (see {self.prog} --help)\n")


def _one_line(text: object) -> str:
    """Text as one line that shows what it is made of."""
    return " ".join(str(text).split()).translate(_CONTROLS)


def _whole(low: int) -> Callable[[str], int]:
    """A type for argparse: an integer from ``low`` to what C takes."""
    high = 2**31 - 1

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range, expected {low} to {high}")
        return value

    return convert


def _parser() -> _Parser:
    parser = _Parser(
        prog="sllm",
        description="Text from a language model, sooner with a draft model, exactly the target's own.",
        epilog="Exit status: 0; 1 where the demo's texts differ; 2 after an error (SLLM_DEBUG=1 shows more);"
        " 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    version = f"sllm {sllm.__version__} (llama.cpp {sllm.llama_cpp_commit})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(
        name: str, run: Callable[[argparse.Namespace, _Output], int], help_text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "Show speculative decoding on the models that come with the package.")
    demo.add_argument("prompt", metavar="PROMPT", nargs="?", default=_DEMO_PROMPT, help="what to answer")
    demo.add_argument("-n", "--max-tokens", metavar="N", type=_whole(1), default=300, help="at most N tokens")
    shown = "(default: %(default)s)"
    demo.add_argument("--temperature", metavar="T", type=float, default=0.4, help=shown)
    demo.add_argument("--seed", metavar="N", type=int, default=1, help=shown)
    threads = "CPU threads of each of the models (default: all cores)"
    demo.add_argument("--threads", metavar="N", type=_whole(1), help=threads)

    default = sllm.SamplingParams()
    run = command("run", _run, "Write the text behind a prompt.")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; '-', or none and a pipe: stdin")
    model = "a GGUF file or hf://owner/repo/file.gguf"
    run.add_argument("--target", metavar="GGUF", help=f"{model} (default: the package's own small model)")
    run.add_argument(
        "--draft",
        metavar="GGUF|ngram|none",
        help=f"{model}, prompt lookup, or nothing (default: the package's own for its own target, else none)",
    )
    run.add_argument("--chat", action="store_true", help="PROMPT is a message, for the chat template")
    run.add_argument("-n", "--max-tokens", metavar="N", type=_whole(1), help="at most N tokens")
    run.add_argument("--stop", metavar="S", action="append", default=[], help="end before S; may be repeated")
    sampling = run.add_argument_group("sampling")
    for option, metavar, kind, value in [
        ("--temperature", "T", float, default.temperature),
        ("--top-k", "K", int, default.top_k),
        ("--top-p", "P", float, default.top_p),
        ("--min-p", "P", float, default.min_p),
        ("--seed", "N", int, default.seed),
    ]:
        sampling.add_argument(option, metavar=metavar, type=kind, default=value, help=shown)
    sampling.add_argument("--grammar-file", metavar="FILE", help="a GBNF grammar that the text must match")
    machine = run.add_argument_group("machine")
    machine.add_argument("--n-ctx", metavar="N", type=_whole(1), help="positions of the context")
    machine.add_argument("--threads", metavar="N", type=_whole(1), help=threads)
    machine.add_argument(
        "--n-gpu-layers",
        metavar="N",
        type=_whole(0),
        help="layers of the target on GPUs; 0: nothing, the draft neither (default: all)",
    )
    run.add_argument("--stats", action="store_true", help="say on stderr what it took")

    command("devices", _devices, "List the devices that models can run on.")

    inspect = command("inspect", _inspect, "Say what is in a model file.")
    inspect.add_argument("model", metavar="GGUF", help=model)
    inspect.add_argument("--json", action="store_true", help="as a JSON object")
    return parser


# ---- sllm run


def _run(args: argparse.Namespace, out: _Output) -> int:
    sampling = sllm.SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        grammar=None if args.grammar_file is None else _read_grammar(args.grammar_file),
    )
    if "" in args.stop:
        raise _CommandError("--stop is empty")
    text = _read_prompt(args.prompt)
    with ExitStack() as stack:
        model = stack.enter_context(
            sllm.Model(
                embedded.TARGET if args.target is None else args.target, n_gpu_layers=args.n_gpu_layers
            )
        )
        if sampling.grammar is not None:
            _check_grammar(model, sampling, args.grammar_file)
        draft = _open_draft(args, stack)
        prompt = _as_message(model, text) if args.chat else text
        target: sllm.Model | sllm.LocalTarget = model
        ours = args.target is None
        if ours or args.n_ctx is not None or args.threads is not None:
            settings = _EXACT if ours else {}
            target = stack.enter_context(
                sllm.LocalTarget(model, n_ctx=args.n_ctx, n_threads=args.threads, **settings)
            )
        # Otherwise generate() makes the context to the text's measure, and shares out the cores.
        drafter: sllm.Model | ModelDrafter | str | None = draft
        if isinstance(draft, sllm.Model) and args.threads is not None:
            n_ctx = min(n for n in (args.n_ctx, draft.n_ctx_train, 4096) if n)
            drafter = stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=args.threads))
        stream = stack.enter_context(
            sllm.generate(
                target, prompt, draft=drafter, sampling=sampling, max_tokens=args.max_tokens, stop=args.stop
            )
        )
        for run in stream:
            out.text(run.text)
        out.end_line()
        if args.stats:
            for line in _summary(stream.stats):
                out.note(line)
    return 0


def _open_draft(args: argparse.Namespace, stack: ExitStack) -> sllm.Model | str | None:
    """What ``--draft`` names."""
    name: str | os.PathLike[str] | None = args.draft
    if name is None and args.target is None:
        name = embedded.DRAFT
    if name is None or name == "none":
        return None
    if name == "ngram":
        return "ngram"
    try:
        return stack.enter_context(sllm.Model(name, n_gpu_layers=0 if args.n_gpu_layers == 0 else None))
    except sllm.ModelLoadError as error:
        raise _CommandError(f"--draft: {error} (or ngram, or none)") from error


def _read_prompt(argument: str | None) -> str:
    """The prompt, from the command line or from stdin, there without the line end that ``echo`` adds."""
    if argument is not None and argument != "-":
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise _CommandError("there is no prompt: name one, or pipe it into stdin (see sllm run --help)")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _CommandError(f"stdin is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_grammar(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _CommandError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_grammar(model: sllm.Model, sampling: sllm.SamplingParams, name: str) -> None:
    """Compile the grammar; llama.cpp's parser tells what is wrong with it on descriptor 2, nowhere else."""
    with tempfile.TemporaryFile() as told:
        stderr = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            model.compiled(sampling)
        except ValueError as error:
            told.seek(0)
            lines = told.read().decode("utf-8", "replace").splitlines()
            reason = lines[0].removeprefix("parse: ") if lines else error
            raise _CommandError(f"{name}: {reason}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _as_message(model: sllm.Model, text: str) -> npt.NDArray[np.int32]:
    """A prompt of one message by the user."""
    return model.chat([{"role": "user", "content": text}])


def _summary(stats: GenerationStats) -> list[str]:
    """The figures of a text, for people."""
    lines = [
        f"prompt: {_count(stats.n_prompt, 'token')}, {stats.prompt_seconds:.2f} s",
        f"text: {_count(stats.n_tokens, 'token')}, {stats.seconds:.2f} s, {stats.tokens_per_s:.1f} tokens/s",
        f"passes of the target: {stats.n_passes}, {stats.passes_per_token:.2f} per token",
    ]
    if stats.n_drafted:
        accepted = f"{stats.n_accepted} of {stats.n_drafted} accepted ({stats.acceptance:.2f})"
        lines.append(f"draft: {accepted}, {stats.draft_seconds:.2f} s")
    reasons = {
        "eog": "the model ended the text",
        "length": "--max-tokens",
        "context": "the context is full (--n-ctx)",
        "stop": "--stop",
    }
    return [*lines, f"ended by: {reasons.get(stats.finish_reason or '', stats.finish_reason)}"]


# ---- sllm demo


class _EagerDrafter(ModelDrafter):
    """Drafts at every turn, so that there is something to see; generate() by itself drafts where it pays."""

    adaptive = False

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """A few likely tokens, whatever was asked for."""
        return super().draft(text, chain, min(n_max, 4), max(p_min, 0.3))


@dataclass(frozen=True)
class _Told:
    """One way through the demo's text."""

    how: str
    tokens: tuple[int, ...]
    text: str
    stats: GenerationStats


def _demo(args: argparse.Namespace, out: _Output) -> int:
    sampling = sllm.SamplingParams(temperature=args.temperature, seed=args.seed)
    with sllm.Model(embedded.TARGET) as target, sllm.Model(embedded.DRAFT) as draft:
        prompt = _as_message(target, args.prompt)
        out.line(f"target: {_model_line(target)}")
        out.line(f"draft:  {_model_line(draft)}")
        out.text("green" if out.colour else "[in brackets]", style=_GREEN)
        out.line(": drafted, and accepted by the target; everything else is the target's own\n")
        out.line(f"> {args.prompt}\n")

        def show(run: Run) -> None:
            drafted = run.source == "draft"
            text = _bracketed(run.text) if drafted and not out.colour else run.text
            out.text(text, style=_GREEN if drafted else "")

        with _EagerDrafter(draft, n_threads=args.threads) as eager:
            always = _tell("always drafting", target, eager, prompt, sampling, args, show)
        out.end_line()
        out.line()
        with ModelDrafter(draft, n_threads=args.threads) as drafter:
            adaptive = _tell("drafting where it pays", target, drafter, prompt, sampling, args)
        alone = _tell("target alone", target, None, prompt, sampling, args)
    for line in _comparison(always, adaptive, alone):
        out.line(line)
    for other in (always, adaptive):
        difference = _difference(other, alone)
        if difference is not None:
            out.note(f"sllm: {difference}")
            return _DIFFERS
    n_tokens = _count(len(alone.tokens), "token")
    out.line(f"All three texts are the same, the target's own: {n_tokens}, compared one by one.")
    return 0


def _tell(
    how: str,
    model: sllm.Model,
    drafter: ModelDrafter | None,
    prompt: npt.NDArray[np.int32],
    sampling: sllm.SamplingParams,
    args: argparse.Namespace,
    show: Callable[[Run], None] = lambda _run: None,
) -> _Told:
    """Generate the demo's text in a context of its own, which nothing else has touched."""
    tokens: list[int] = []
    text: list[str] = []
    with sllm.LocalTarget(model, n_threads=args.threads, **_EXACT) as target:

        def generate(max_tokens: int) -> TextStream:
            return sllm.generate(target, prompt, draft=drafter, sampling=sampling, max_tokens=max_tokens)

        # Untimed: what computes first in a context pays for pages and graphs that the rest finds ready.
        generate(min(args.max_tokens, 8)).text()
        with generate(args.max_tokens) as stream:
            for run in stream:
                tokens.extend(run.tokens)
                text.append(run.text)
                show(run)
    return _Told(how, tuple(tokens), "".join(text), stream.stats)


def _bracketed(text: str) -> str:
    """Mark drafted text where there are no colours; space around it stays outside, so that it reads well."""
    inside = text.strip()
    if not inside:
        return text
    before, _, behind = text.partition(inside)
    return f"{before}[{inside}]{behind}"


def _model_line(model: sllm.Model) -> str:
    weights = f"{_parameters(model)} parameters, {_size(model.size_bytes)}"
    return f"{model.path.name}, {model.n_layer} layers, {weights}"


def _comparison(always: _Told, adaptive: _Told, alone: _Told) -> list[str]:
    """The demo's table, and in words what it does and does not show."""
    told = (always, adaptive, alone)
    rows = [
        ("", *(one.how for one in told)),
        ("tokens/s", *(f"{one.stats.tokens_per_s:.1f}" for one in told)),
        ("acceptance", *(f"{one.stats.acceptance:.2f}" if one.stats.n_drafted else "-" for one in told)),
        ("passes per token", *(f"{one.stats.passes_per_token:.2f}" for one in told)),
    ]
    lines = _table(rows, right=(1, 2, 3))
    if alone.stats.tokens_per_s:
        ratios = [one.stats.tokens_per_s / alone.stats.tokens_per_s for one in (always, adaptive)]
        lines.append(
            f"In this run {ratios[0]:.2f} times as fast by always drafting, and {ratios[1]:.2f} by drafting"
            " where it pays, the default."
        )
        if max(ratios) < 1.25:
            lines.append(
                "A target this small is quick by itself: a draft saves passes, but a pass takes little time."
            )
    return lines


def _difference(drafted: _Told, alone: _Told) -> str | None:
    """Where two texts differ, in words, or None where they do not."""
    if drafted.tokens == alone.tokens and drafted.text == alone.text:
        return None
    pairs = enumerate(zip(drafted.tokens, alone.tokens, strict=False))
    shorter = min(len(drafted.tokens), len(alone.tokens))
    at = next((index for index, (one, other) in pairs if one != other), shorter)
    return f"the text by {drafted.how!r} is NOT the target's own: it differs from token {at} of the answer on"


# ---- sllm devices, sllm inspect


def _devices(args: argparse.Namespace, out: _Output) -> int:  # noqa: ARG001
    rows = [("", "name", "type", "free", "total", "description")]
    for device in devices():
        free, total = (_size(n) if n else "-" for n in (device.memory_free, device.memory_total))
        rows.append((str(device.index), device.name, device.type, free, total, device.description))
    for line in _table(rows, right=(0, 3, 4)):
        out.line(line)
    return 0


def _inspect(args: argparse.Namespace, out: _Output) -> int:
    with sllm.Model(args.model, n_gpu_layers=0) as model:
        found: dict[str, Any] = {
            "file": str(model.path),
            "file_bytes": model.path.stat().st_size,
            "architecture": model.architecture,
            "description": model.description,
            "name": model.metadata.get("general.name"),
            "n_params": model.n_params,
            "size_bytes": model.size_bytes,
            "n_layer": model.n_layer,
            "n_embd": model.n_embd,
            "n_head": model.n_head,
            "n_head_kv": model.n_head_kv,
            "n_ctx_train": model.n_ctx_train,
            "n_vocab": model.vocab.n_tokens,
            "vocab_fingerprint": _fingerprint(model),
            "chat_template": "tokenizer.chat_template" in model.metadata,
            "can_rollback": model.can_rollback,
        }
        if args.json:
            out.line(json.dumps(found, indent=2))
            return 0
        rows = [
            ("file", f"{found['file']} ({_size(found['file_bytes'])})"),
            ("architecture", found["architecture"]),
            ("description", found["description"]),
            ("name", found["name"] or "-"),
            ("parameters", f"{_parameters(model)} in {_size(model.size_bytes)}"),
            ("layers", str(model.n_layer)),
            ("width", str(model.n_embd)),
            ("heads", f"{model.n_head}, {model.n_head_kv} of keys and values"),
            ("context", f"{model.n_ctx_train} tokens"),
            ("vocabulary", f"{model.vocab.n_tokens} tokens"),
            ("fingerprint", found["vocab_fingerprint"] or "-"),
            ("chat template", "yes" if found["chat_template"] else "no"),
            ("speculation", "yes" if model.can_rollback else "no: it cannot take back single tokens"),
        ]
    for line in _table([(name, _one_line(value)) for name, value in rows]):
        out.line(line)
    return 0


def _fingerprint(model: sllm.Model) -> str | None:
    try:
        return model.vocab.fingerprint
    except (sllm.UnsupportedModelError, ValueError):
        return None  # a file of layers alone has no vocabulary


# ---- what they share


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows in columns, two spaces apart; the columns in ``right`` are aligned there."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _size(n_bytes: int) -> str:
    """Bytes for people: 5.8 MB."""
    return _scaled(n_bytes, [("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)])


def _parameters(model: sllm.Model) -> str:
    """The number of weights for people: 7.6 B."""
    return _scaled(model.n_params, [("", 1), ("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)])


def _scaled(number: int, units: Sequence[tuple[str, int]]) -> str:
    unit, factor = next(((u, f) for u, f in reversed(units) if number >= f), units[0])
    return f"{number / factor:.1f} {unit}" if factor > 1 else f"{number} {unit}".rstrip()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _reason(error: Exception) -> str:
    """An exception as one line that needs no knowledge of Python."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    text = _one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if text else ''}{text}"
    if text and isinstance(error, (sllm.SllmError, OSError, ValueError, TypeError)):
        return text
    return f"{type(error).__name__}: {text} (unexpected; SLLM_DEBUG=1 shows where)"


@contextmanager
def _interrupts() -> Iterator[None]:
    """Keep the promise that Ctrl-C ends the program within a second.

    Python raises KeyboardInterrupt between two steps of its own, and a load or a decode lets it do so now and
    then: nearly always the program ends in good order. A call that does not come back in time (megabytes to
    tokenize, a driver) is left where it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGINT and not over.wait(_GRACE_SECONDS):
                    os._exit(_INTERRUPTED)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="sllm-interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)
        watcher.join()


@contextmanager
def _shown_log(out: _Output, *, debug: bool) -> Iterator[None]:
    logger = logging.getLogger("sllm")
    level = logger.level
    handler = _Notes(out, debug=debug)
    logger.addHandler(handler)
    if debug:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own) and return the exit status."""
    debug = bool(os.environ.get("SLLM_DEBUG"))
    out = _Output()
    try:
        with _interrupts(), _shown_log(out, debug=debug):
            try:
                args = _parser().parse_args(argv)
            except SystemExit as ended:  # --help, --version, or an error that was told
                out.flush()
                return ended.code if isinstance(ended.code, int) else _FAILED
            status: int = args.run(args, out)
            return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: nothing but the way out is left
        with suppress(_WriteError):
            if out.terminal:
                out.end_line()
        return _INTERRUPTED
    except _WriteError as error:
        if error.reader_gone:
            return _READER_GONE
        out.note(f"sllm: cannot write to stdout: {error.reason}")
        return _FAILED
    except Exception as error:  # noqa: BLE001 - the last resort: a person gets a line, not a traceback
        out.note(traceback.format_exc().rstrip() if debug else f"sllm: {_reason(error)}")
        return _FAILED
