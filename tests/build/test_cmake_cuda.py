"""What the build says of a CUDA toolkit that is not there, or not all of it: cmake/Cuda.cmake, with toolkits
made for it whose nvcc is the C++ compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[2] / "cmake" / "Cuda.cmake"
CMAKE = shutil.which("cmake")
MAKE = shutil.which("make") or shutil.which("ninja")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="no cmake on PATH"),
    pytest.mark.skipif(MAKE is None, reason="no make and no ninja on PATH"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH"),
    pytest.mark.skipif(not MODULE.exists(), reason="no source tree around the tests"),
]

# It answers what FindCUDAToolkit and the check ask an nvcc (its version, where it looks, for which GPUs it
# compiles), and compiles what C++ can say. `native` is what it says to -arch=native.
NVCC = """\
#!/bin/sh
root={root}
case "$*" in
  *__cmake_determine_cuda*)
    echo "#$ TOP=$root" >&2
    echo "#$ INCLUDES=\\"-I$root/include\\"" >&2
    echo "#$ LIBRARIES=  \\"-L$root/lib\\"" >&2
    exit 1;;
  *--version*)
    echo "nvcc: NVIDIA (R) Cuda compiler driver"
    echo "Cuda compilation tools, release 12.4, V12.4.131"
    exit;;
  *--list-gpu-arch*)
    printf 'compute_50\\ncompute_80\\ncompute_90\\n'
    exit;;
  *--dryrun*compute_50*|*--dryrun*compute_80*|*--dryrun*compute_90*)
    exit;;
  *--dryrun*compute_*)
    echo "nvcc fatal   : Unsupported gpu architecture 'compute_120'" >&2
    exit 1;;
  *--dryrun*-arch=native*)
    echo "{native}" >&2
    exit;;
esac
for argument do
  shift
  case $argument in -ccbin=*) echo "$argument" > "$root/ccbin";; *) set -- "$@" "$argument";; esac
done
exec {compiler} -x c++ -D__global__= -I"$root/include" "$@"
"""

NO_GPU = "nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used\n#$ ptxas -arch=sm_52"


class Toolkit:
    """A CUDA toolkit with everything, from which a test takes something away."""

    def __init__(self, root: Path, *, native: str = "#$ ptxas -arch=sm_90") -> None:
        self.root = root
        self.nvcc = root / "bin" / "nvcc"
        headers = ("cuda.h", "cuda_bf16.h", "cuda_fp16.h", "cublas_v2.h", "cub/cub.cuh")
        libraries = ("libcudart.so", "libcublas.so", "libcublasLt.so", "stubs/libcuda.so")
        for path in (*(f"include/{name}" for name in headers), *(f"lib/{name}" for name in libraries)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        (root / "include" / "cuda_runtime.h").write_text("#define CUDART_VERSION 12040\n")
        self.nvcc.parent.mkdir()
        self.nvcc.write_text(NVCC.format(root=root, native=native, compiler=COMPILER))
        self.nvcc.chmod(0o755)


class Project:
    """A project that does nothing but the check."""

    def __init__(self, source: Path) -> None:
        self.source = source
        (source / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.22)\n"
            "project(check LANGUAGES CXX)\n"
            f'include("{MODULE}")\n'
            "sllm_check_cuda()\n"
            "get_property(compiler CACHE CMAKE_CUDA_COMPILER PROPERTY VALUE)\n"
            "find_package(CUDAToolkit QUIET)\n"  # as llama.cpp does it afterwards
            'message(STATUS "compiler <${compiler}> toolkit <${CUDAToolkit_BIN_DIR}>")\n'
        )

    def configure(self, *options: str, **environment: str) -> tuple[int, str]:
        """The exit status, and all that CMake wrote, with runs of white space as one space."""
        assert CMAKE is not None
        assert MAKE is not None
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CUDA", "NVCC", "CMAKE_", "SOURCE_DATE_EPOCH"))
        }
        command = [
            CMAKE,
            "-G",
            "Ninja" if Path(MAKE).name == "ninja" else "Unix Makefiles",
            "-S",
            str(self.source),
            "-B",
            str(self.source / "build"),
            f"-DSLLM_CUDA_DEFAULT_ROOTS={self.source / 'usual'}",
            f"-DCMAKE_CXX_COMPILER={COMPILER}",
            "-DCMAKE_CXX_COMPILER_WORKS=ON",  # nothing is built with it
            # No toolkit of this machine's, wherever it is: on PATH, among the system's libraries.
            "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF",
            "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",
            f"-DCMAKE_MAKE_PROGRAM={MAKE}",
            *options,
        ]
        ended = subprocess.run(
            command,
            env={**kept, "LC_ALL": "C", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return ended.returncode, " ".join(ended.stdout.split())

    def refused(self, *options: str, **environment: str) -> str:
        """What the check stops with."""
        status, said = self.configure(*options, **environment)
        assert status != 0, said
        message = re.search(r"CMake Error at \S+Cuda\.cmake:\d+ \(message\): (.*?) Call Stack", said)
        assert message is not None, said
        assert "To build without CUDA, give -C cmake.define.GGML_CUDA=OFF instead." in message[1]
        return message[1]

    def accepted(self, *options: str, **environment: str) -> str:
        status, said = self.configure(*options, **environment)
        assert status == 0, said
        return said


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


@pytest.fixture
def toolkit(tmp_path: Path) -> Toolkit:
    return Toolkit(tmp_path / "toolkit")


def test_a_whole_toolkit(project: Project, toolkit: Toolkit) -> None:
    said = project.accepted(CUDAToolkit_ROOT=str(toolkit.root))
    assert re.search(r"CMake Warning at \S*/Cuda\.cmake", said) is None
    assert "compiled for the GPU found here, of compute capability 9.0" in said
    # CMake's search for the language is told, so that it cannot end at another one.
    assert f"compiler <{toolkit.nvcc}> toolkit <{toolkit.root}/bin>" in said


def test_no_toolkit(project: Project) -> None:
    message = project.refused()
    assert "there is no CUDA compiler: nvcc is not on PATH" in message
    assert str(project.source / "usual") in message
    assert "CUDACXX=TOOLKIT/bin/nvcc pip install . -C cmake.define.GGML_CUDA=ON" in message


def test_where_a_toolkit_is_not(project: Project, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"CUDA_PATH ({nowhere})" in project.refused(CUDA_PATH=str(nowhere))
    assert f"CUDACXX is {nowhere}, and there is no such program" in project.refused(CUDACXX=str(nowhere))
    assert f"CMAKE_CUDA_COMPILER is {nowhere}" in project.refused(f"-DCMAKE_CUDA_COMPILER={nowhere}")


@pytest.mark.parametrize("option", [True, False])
def test_a_root_without_a_compiler(project: Project, tmp_path: Path, option: bool) -> None:
    root = str(tmp_path)
    message = (
        project.refused(f"-DCUDAToolkit_ROOT={root}") if option else project.refused(CUDAToolkit_ROOT=root)
    )
    assert f"CUDAToolkit_ROOT is {root}, and there is no bin/nvcc in it" in message


def test_what_was_given_comes_before_what_is_found(
    project: Project, toolkit: Toolkit, tmp_path: Path
) -> None:
    Toolkit(project.source / "usual")
    assert f"compiler <{toolkit.nvcc}> toolkit <{toolkit.root}/bin>" in project.accepted(
        f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}"
    )


def test_on_path(project: Project, toolkit: Toolkit) -> None:
    path = f"{toolkit.nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    said = project.accepted("-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=ON", PATH=path)
    assert f"compiler <{toolkit.nvcc}> toolkit <{toolkit.root}/bin>" in said


def test_where_installers_put_it(project: Project) -> None:
    usual = Toolkit(project.source / "usual")
    assert f"compiler <{usual.nvcc}> toolkit <{usual.root}/bin>" in project.accepted()


def test_an_nvcc_that_does_not_work(project: Project, toolkit: Toolkit) -> None:
    toolkit.nvcc.write_text("#!/bin/sh\necho oops; exit 3\n")
    message = project.refused(CUDACXX=str(toolkit.nvcc))
    assert "is no nvcc that works" in message
    assert "oops" in message


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("cublas_v2.h", ["no cuBLAS headers (cublas_v2.h)", "CMAKE_CUDA_FLAGS=-IFOLDER"]),
        ("cub/cub.cuh", ["no CCCL headers (cub/cub.cuh)", "cuda-cccl"]),
        ("cuda_fp16.h", ["is not complete: it has no cuda_fp16.h"]),
        ("cuda_runtime.h", ["is not complete: it has no cuda_runtime.h", "cuda-cudart-dev"]),
    ],
)
def test_a_header_is_missing(project: Project, toolkit: Toolkit, header: str, words: list[str]) -> None:
    (toolkit.root / "include" / header).unlink()
    message = project.refused(CUDACXX=str(toolkit.nvcc))
    assert f"CUDA 12.4 toolkit of {toolkit.nvcc}" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("libcudart.so", ["no runtime library (libcudart.so)"]),
        ("libcublas.so", ["no cuBLAS library (libcublas.so)", "CUDA_cublas_LIBRARY=FOLDER/libcublas.so"]),
        ("stubs/libcuda.so", ["There is no libcuda.so to link", "GGML_CUDA_NO_VMM=ON"]),
    ],
)
def test_a_library_is_missing(project: Project, toolkit: Toolkit, library: str, words: list[str]) -> None:
    (toolkit.root / "lib" / library).unlink()
    message = project.refused(CUDACXX=str(toolkit.nvcc))
    for word in words:
        assert word in message
    if library.endswith("libcuda.so"):
        project.accepted("-DGGML_CUDA_NO_VMM=ON", CUDACXX=str(toolkit.nvcc))


def test_headers_and_libraries_of_other_folders(project: Project, toolkit: Toolkit, tmp_path: Path) -> None:
    other = tmp_path / "cublas"
    other.mkdir()
    (toolkit.root / "include" / "cublas_v2.h").rename(other / "cublas_v2.h")
    (toolkit.root / "lib" / "libcublas.so").rename(other / "libcublas.so.12")
    flags = (f"-DCMAKE_CUDA_FLAGS=-I{other}", f"-DCUDA_cublas_LIBRARY={other}/libcublas.so.12")
    project.accepted(*flags, CUDACXX=str(toolkit.nvcc))
    message = project.refused(flags[0], f"-DCUDA_cublas_LIBRARY={other}/x.so", CUDACXX=str(toolkit.nvcc))
    assert f"CUDA_cublas_LIBRARY is {other}/x.so, and there is no such file" in message


def test_the_next_run_may_be_told_of_another_toolkit(
    project: Project, toolkit: Toolkit, tmp_path: Path
) -> None:
    (toolkit.root / "lib" / "libcublas.so").unlink()
    project.refused(CUDAToolkit_ROOT=str(toolkit.root))
    whole = Toolkit(tmp_path / "whole")
    said = project.accepted(CUDAToolkit_ROOT=str(whole.root))
    assert f"compiler <{whole.nvcc}> toolkit <{whole.root}/bin>" in said


@pytest.mark.parametrize("kind", ["GNU", "clang"])
def test_a_compiler_that_nvcc_does_not_know(project: Project, toolkit: Toolkit, kind: str) -> None:
    (toolkit.root / "include" / "cuda_runtime.h").write_text(
        f"#error -- unsupported {kind} version! {kind} versions later than 13 are not supported!"
        " The nvcc flag '-allow-unsupported-compiler' can be used to override this version check\n"
    )
    message = project.refused(CUDACXX=str(toolkit.nvcc))
    assert "nvcc 12.4" in message
    assert "does not go with this machine's C++ compiler" in message
    assert f"{kind} versions later than 13 are not supported!" in message
    assert "CMAKE_CUDA_HOST_COMPILER=/usr/bin/g++-N" in message
    assert "allow-unsupported" not in message  # it may well compile, and compute something else


def test_the_host_compiler_is_the_one_that_was_given(project: Project, toolkit: Toolkit) -> None:
    project.accepted(f"-DCMAKE_CUDA_HOST_COMPILER={COMPILER}", CUDACXX=str(toolkit.nvcc))
    assert (toolkit.root / "ccbin").read_text().strip() == f"-ccbin={COMPILER}"


def test_anything_else_is_told_in_the_words_of_nvcc(project: Project, toolkit: Toolkit) -> None:
    (toolkit.root / "include" / "cuda.h").write_text("#error one; or another\n")
    message = project.refused(CUDACXX=str(toolkit.nvcc))
    assert "cannot compile an empty kernel with ggml's headers. It says:" in message
    assert "one; or another" in message


def test_a_gpu_that_nvcc_does_not_know(project: Project, toolkit: Toolkit) -> None:
    message = project.refused("-DCMAKE_CUDA_ARCHITECTURES=80;120a-real", CUDACXX=str(toolkit.nvcc))
    assert "does not compile for 120a, which CMAKE_CUDA_ARCHITECTURES names. It knows: 50, 80, 90." in message
    assert "does not compile for 120" in project.refused(CUDACXX=str(toolkit.nvcc), CUDAARCHS="120")


def test_the_gpus_that_were_asked_for(project: Project, toolkit: Toolkit) -> None:
    said = project.accepted("-DCMAKE_CUDA_ARCHITECTURES=80-virtual;90", CUDACXX=str(toolkit.nvcc))
    assert "CUDA kernels are compiled for: 80-virtual;90" in said


@pytest.mark.parametrize("asked", [[], ["-DCMAKE_CUDA_ARCHITECTURES=native"]])
def test_no_gpu_and_none_asked_for(project: Project, tmp_path: Path, asked: list[str]) -> None:
    toolkit = Toolkit(tmp_path / "toolkit", native=NO_GPU)
    said = project.accepted(*asked, CUDACXX=str(toolkit.nvcc))
    assert re.search(r"CMake Warning at \S+Cuda\.cmake", said)
    assert "No GPU is found here" in said
    assert "nvcc takes its default, compute capability 5.2" in said
    assert "pip install . -C cmake.define.GGML_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90" in said


def test_a_build_for_other_machines_is_for_many_gpus(project: Project, tmp_path: Path) -> None:
    toolkit = Toolkit(tmp_path / "toolkit", native=NO_GPU)
    said = project.accepted("-DGGML_NATIVE=OFF", CUDACXX=str(toolkit.nvcc))
    assert re.search(r"CMake Warning at \S*/Cuda\.cmake", said) is None
    assert "llama.cpp's whole list of GPUs" in said
