"""Write a header that gives every function of ggml's that crosses a shared library a prefix of our own.

In a portable build ggml is a shared library and its CPU kernels are modules that find its functions by name
while they are loaded. Names are looked up in the whole process first: where somebody has made another ggml
visible to everybody (``dlopen(..., RTLD_GLOBAL)``), our modules would call that one. With names that nobody
else has there is nothing to mix up. The compiler is told to read the header before every source file of
llama.cpp's and ours, so definitions, declarations and calls change together. (BoringSSL and zlib have the
same option, as ``BORINGSSL_PREFIX`` and ``Z_PREFIX``.)

Run by CMake: ``prefix_symbols.py GGML_DIR OUTPUT``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PREFIX = "sllm_"

# What ggml looks up in a module by these very words (ggml-backend-reg.cpp).
BY_NAME = {"ggml_backend_init", "ggml_backend_score"}

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", re.MULTILINE)
# The first name in small letters that is followed by arguments, an array's size, a value or the end.
_EXPORT = re.compile(r"\bGGML_(?:BACKEND_)?API\b[^;{]*?\b([a-z]\w+)\s*(?=[(\[=;])")


def exported_names(ggml: Path) -> set[str]:
    """The functions and variables that ggml's headers declare for use by other libraries."""
    names: set[str] = set()
    for header in sorted([*ggml.glob("include/*.h"), *ggml.glob("src/*.h")]):
        text = header.read_text(encoding="utf-8", errors="replace")
        names.update(_EXPORT.findall(_DIRECTIVE.sub("", _COMMENT.sub("", text))))
    return names - BY_NAME


def main() -> None:
    """Write OUTPUT, unless it says the same already: then nothing has to be compiled again."""
    ggml, output = Path(sys.argv[1]), Path(sys.argv[2])
    names = sorted(exported_names(ggml))
    if not names:
        sys.exit(f"{ggml} declares no function of ggml's; is it llama.cpp's ggml folder?")
    lines = ["// Written by cmake/prefix_symbols.py.", "#pragma once", ""]
    lines += [f"#define {name} {PREFIX}{name}" for name in names]
    text = "\n".join(lines) + "\n"
    if not output.exists() or output.read_text(encoding="utf-8") != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
