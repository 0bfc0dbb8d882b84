"""llama.cpp's AMX kernels, as far as a machine without AMX can tell."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pinned_source import ROOT, VENDOR, fetch

KERNELS = "ggml/src/ggml-cpu/amx/mmq.cpp"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]

pytestmark = pytest.mark.skipif(
    not (VENDOR / "source" / KERNELS).exists(), reason="the pinned sources are not here"
)


@pytest.fixture(scope="module")
def kernels() -> str:
    return (VENDOR / "source" / KERNELS).read_text(encoding="utf-8")


# --- what the tile configuration is loaded from is in memory ---

# The constraints of GCC 12's _tile_loadconfig and of every GCC's _tile_loadd, over instructions that every
# x86-64 has: 64 bytes are copied to where they can be looked at.
PROBE = """
#include <stdint.h>
#include <stdio.h>

alignas(64) extern unsigned char seen[64];

#define COPY                                                                                    \\
    "movups (%%rax), %%xmm0; movups %%xmm0, (%%rdx); movups 16(%%rax), %%xmm0; movups %%xmm0, 16(%%rdx);" \\
    "movups 32(%%rax), %%xmm0; movups %%xmm0, 32(%%rdx); movups 48(%%rax), %%xmm0; movups %%xmm0, 48(%%rdx)"

static inline __attribute__((always_inline)) void _tile_loadconfig(const void * config) {
    __asm__ volatile("lea %0, %%rax; " COPY
                     : : "m"(*(const void * const *) config), "d"(seen) : "rax", "xmm0");
}

#define _tile_loadd(tile, base, stride) \\
    __asm__ volatile(COPY : : "a"((const void *) (base)), "d"(seen), "r"((long) (stride)) : "xmm0")

// THE KERNELS

__attribute__((noinline)) void configure() { ggml_tile_config_init(); }

__attribute__((noinline)) void load(unsigned char first) {
    unsigned char tile[64];
    for (int i = 0; i < 64; ++i) tile[i] = first + i;
    TILE_LOADD(0, tile, 64);
}

static void show() {
    __asm__ volatile("" : : : "memory");
    for (unsigned char byte : seen) printf("%d ", byte);
    printf("\\n");
}

int main() {
    configure();
    show();
    load(7);
    show();
}

alignas(64) unsigned char seen[64];
"""
TILES = [(8, 64)] * 2 + [(16, 32)] * 2 + [(16, 64)] * 4
CONFIGURATION = [1, 0, *[0] * 14]  # the palette and the first row
CONFIGURATION += [byte for _, columns in TILES for byte in (columns, 0)] + [0] * 16
CONFIGURATION += [rows for rows, _ in TILES] + [0] * 8


def loaded(compiler: str, level: str, kernels: str, folder: Path) -> list[list[int]]:
    """What a configuration and a tile are loaded from, in what this compiler makes of the kernels."""
    begin, end = (
        kernels.index("// patch 0001 (amx-tile-memory) is in"),
        kernels.index("\n}\n\n// we need an extra"),
    )
    part = kernels[begin:end] + "\n}\n"
    (folder / "probe.cpp").write_text(PROBE.replace("// THE KERNELS", part))
    command = [compiler, "-std=c++17", level, "-o", str(folder / "probe"), str(folder / "probe.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    output = subprocess.run([folder / "probe"], check=True, capture_output=True, text=True).stdout
    return [[int(byte) for byte in line.split()] for line in output.splitlines()]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
@pytest.mark.skipif(not COMPILERS, reason="there is neither g++ nor clang++")
@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_tiles_and_their_configuration_are_loaded_whole(
    compiler: str, level: str, kernels: str, tmp_path: Path
) -> None:
    assert loaded(compiler, level, kernels, tmp_path) == [CONFIGURATION, [7 + i for i in range(64)]]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
@pytest.mark.skipif("g++" not in COMPILERS, reason="there is no g++")
def test_without_the_patch_they_would_not_be(kernels: str, tmp_path: Path) -> None:
    unpatched, count = re.subn(r'__asm__ volatile\("" .*"memory"\)', "(void) 0", kernels)
    assert count == 2
    configuration, tile = loaded("g++", "-O3", unpatched, tmp_path)
    assert configuration != CONFIGURATION
    assert tile != [7 + i for i in range(64)]


# --- SLLM_AMX=ON is refused where it could not be right ---

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(amx LANGUAGES CXX)
if(PROCESSOR)
  set(CMAKE_SYSTEM_PROCESSOR "${PROCESSOR}")
endif()
if(NO_FLAG)
  set(SLLM_COMPILER_KNOWS_AMX_int8 FALSE)  # as the check leaves it with a compiler that is too old
endif()
include("${MODULE}")
sllm_check_amx("${LLAMA_DIR}")
message(STATUS "AMX may be built")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "CMakeLists.txt").write_text(PROJECT)
    return folder


def configured(project: Path, llama_dir: Path, **settings: str) -> tuple[bool, str]:
    """Whether CMake went through, and what it said, without its line breaks."""
    given = {
        "MODULE": ROOT / "cmake/Amx.cmake",
        "LLAMA_DIR": llama_dir,
        "PROCESSOR": "",
        "NO_FLAG": "",
        **settings,
    }
    command = ["cmake", "-S", str(project), "-B", str(project / "build")]
    command += [f"-D{name}={value}" for name, value in given.items()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode == 0, " ".join((result.stdout + result.stderr).split())


needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or not COMPILERS, reason="there is no cmake, or no compiler"
)


def copy_of_kernels(folder: Path, text: str) -> Path:
    (folder / KERNELS).parent.mkdir(parents=True)
    (folder / KERNELS).write_text(text, encoding="utf-8")
    return folder


@needs_cmake
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
def test_amx_may_be_built_from_the_patched_sources(project: Path) -> None:
    went_through, said = configured(project, VENDOR / "source")
    assert went_through and "AMX may be built" in said, said


@needs_cmake
def test_sources_without_a_patch_are_refused(project: Path, kernels: str, tmp_path: Path) -> None:
    llama_dir = copy_of_kernels(tmp_path, kernels.replace("patch 0002 (amx-batches) is in", ""))
    went_through, said = configured(project, llama_dir, PROCESSOR="x86_64")
    assert not went_through
    assert "wrong results" in said and "SIGILL" in said and "git apply" in said and "SLLM_AMX=OFF" in said
    assert "0002-amx-batches.patch" in said and "0001-amx" not in said


@needs_cmake
def test_sources_without_amx_kernels_are_refused(project: Path, tmp_path: Path) -> None:
    went_through, said = configured(project, tmp_path, PROCESSOR="x86_64")
    assert not went_through and "no AMX kernels where they are looked for" in said


@needs_cmake
def test_other_processors_are_refused(project: Path) -> None:
    went_through, said = configured(project, VENDOR / "source", PROCESSOR="aarch64")
    assert not went_through and 'AMX is of x86-64; this build is for "aarch64"' in said


@needs_cmake
def test_a_compiler_that_does_not_know_amx_is_refused(project: Path) -> None:
    went_through, said = configured(project, VENDOR / "source", PROCESSOR="x86_64", NO_FLAG="1")
    assert not went_through and "does not know -mamx-int8" in said


def test_every_amx_patch_leaves_the_line_that_is_looked_for(kernels: str) -> None:
    for path in (VENDOR / "patches").glob("*-amx-*.patch"):
        number, _, name = path.stem.partition("-")
        assert f"patch {number} ({name}) is in" in kernels
        assert KERNELS in fetch.Patch.load(path).files
