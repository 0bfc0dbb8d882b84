"""Write the C source of an extension module from the one header that describes it.

``sllm.h`` is the whole C ABI of ``sllm._core``, ``cpu.h`` that of ``sllm._cpu``. What stands between the two
marker lines of a header is plain enough for cffi to read, so nothing is declared twice: a change of the
header is a change of the extension, and the C compiler checks one against the other. Callbacks into Python
are added here, since cffi writes their C side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cffi

BEGIN = "/* cffi: begin */"
END = "/* cffi: end */"

# Python functions that C may call; sllm/_ffi.py defines them.
CALLBACKS = {
    "_core": """
extern "Python" int sllm_py_progress(float, void *);
extern "Python" int sllm_py_interrupted(void *);
extern "Python" int sllm_py_allowed(
    void *, const int32_t *, int32_t, const int32_t *, int32_t, uint32_t *, char *, int32_t);
"""
}


def declarations(header: Path) -> str:
    """The part of the header that cffi is to read."""
    text = header.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f'{header}: expected one line "{BEGIN}" and, after it, one line "{END}"')
    return text.partition(BEGIN)[2].partition(END)[0]


def generate(module: str, header: Path, output: Path) -> None:
    """Write ``output``, which CMake compiles as a part of the extension."""
    ffi = cffi.FFI()
    ffi.cdef(declarations(header) + CALLBACKS.get(module, ""))
    ffi.set_source(f"sllm.{module}", f'#include "{header.name}"')
    ffi.emit_c_code(str(output))


def main() -> None:
    """Run by CMake: ``build_ffi.py _core sllm.h _core.c``."""
    parser = argparse.ArgumentParser(description="Write the C source of an extension module.")
    parser.add_argument("module", help="_core or _cpu")
    parser.add_argument("header", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    generate(options.module, options.header, options.output)


if __name__ == "__main__":
    main()
