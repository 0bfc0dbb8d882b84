"""The portable build, as packagers make it: one wheel for all CPUs, alone with its names, and with backends
of its own or of other packages.

``$SLLM_TEST_WHEEL`` is a portable wheel to test in place of one built here; ``$SLLM_CPU_VARIANTS`` is what
that build is given.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import wheel_environment
from processes import environment

import sllm
from sllm.engine import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="written for ELF and x86-64"
    ),
]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout, in a build tree that the next run uses again."""
    given = os.environ.get("SLLM_TEST_WHEEL")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("portable")
    command: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder]
    if shutil.which("ninja") and not subprocess.call([sys.executable, "-c", "import scikit_build_core"]):
        command += ["--no-build-isolation"]
    command += ["-C", f"build-dir={ROOT / 'build/portable'}", ROOT]
    subprocess.run(command, env=os.environ | {"SLLM_PORTABLE": "ON"}, check=True)
    (made,) = folder.iterdir()
    return made


class Installed:
    """The wheel in an environment of its own, beside this one's other packages."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.python, self.site = wheel_environment.unpack(wheel, folder)
        self.package = self.site / "sllm"
        self.lib = self.package / "lib"

    def run(self, code: str, *args: str | Path, runner: Sequence[str] = (), **more: str) -> Any:
        """What the code prints at last, as JSON."""
        result = subprocess.run(
            [*runner, self.python, "-c", code, *args],
            cwd=self.site.parent,
            env={k: v for k, v in environment(**more).items() if k != cpu.VARIABLE or k in more},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed") / "venv", wheel)


@pytest.fixture
def copied(wheel: Path, tmp_path: Path) -> Installed:
    """One to change."""
    return Installed(tmp_path / "venv", wheel)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- the wheel ---


def test_the_wheel_holds_its_libraries_once_and_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    libraries = {Path(name).name for name in names if name.startswith("sllm/lib/")}
    tag = sllm.llama_cpp_commit[:9]
    assert {f"libsllm-ggml-base-{tag}.so", f"libsllm-ggml-{tag}.so", "libsllm-ggml-rpc.so"} <= libraries
    assert "libsllm-ggml-cpu-haswell.so" in libraries
    assert not [name for name in libraries if "sapphirerapids" in name or "amx" in name]
    assert all(name.startswith("libsllm-ggml-") and name.endswith(".so") for name in libraries)
    assert {"sllm/_core.abi3.so", "sllm/_cpu.abi3.so"} <= names
    assert {name.partition("/")[0] for name in names} == {"sllm", f"sllm-{sllm.__version__}.dist-info"}
    assert wheel.stat().st_size < 25e6


@pytest.mark.parametrize(
    "command",
    [
        ("abi3audit", "--strict"),
        ("check_wheel_contents",),
        ("auditwheel", "show"),
    ],
    ids=lambda command: command[0],
)
def test_checkers_of_wheels_find_nothing(wheel: Path, command: tuple[str, ...]) -> None:
    if subprocess.call([sys.executable, "-c", f"import {command[0]}"], stderr=subprocess.DEVNULL):
        pytest.skip(f"{command[0]} is not installed (pip install 'sllm[dev]')")
    result = subprocess.run(
        [sys.executable, "-m", *command, wheel], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if command[0] == "auditwheel":  # nothing but the C and C++ libraries, and OpenMP's, from outside
        wanted = set(re.findall(r"lib[\w+-]+\.so(?:\.\d+)*", result.stdout)) - {"libgomp.so.1"}
        assert not {
            name for name in wanted if not re.match(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|mvec)\.", name)
        }


def test_nothing_of_llama_cpp_is_visible_under_its_own_name(installed: Installed) -> None:
    def symbols(path: Path, *options: str) -> set[str]:
        lines = output("nm", "--dynamic", "--format=posix", *options, path).splitlines()
        return {line.split()[0].partition("@")[0] for line in lines}

    for name in ("_core", "_cpu"):
        assert symbols(installed.package / f"{name}.abi3.so", "--defined-only") == {f"PyInit_{name}"}
    for path in installed.lib.iterdir():
        shown = symbols(path, "--defined-only")
        assert shown, path
        assert {s for s in shown if not re.match(r"(sllm_|_Z.*sllm_)", s)} <= {
            "ggml_backend_init",
            "ggml_backend_score",
        }
    ours = {s for path in installed.lib.iterdir() for s in symbols(path, "--defined-only")}
    for path in [*installed.lib.iterdir(), installed.package / "_core.abi3.so"]:
        wanted = symbols(path, "--undefined-only")
        assert not {s for s in wanted if re.match(r"(ggml|gguf|llama|(de)?quantize)_", s)}, path
        assert {s for s in wanted if "sllm_" in s} <= ours


def test_libraries_are_found_beside_each_other_alone(installed: Installed) -> None:
    tag = sllm.llama_cpp_commit[:9]

    def entry(path: Path, name: str) -> list[str]:
        return re.findall(rf"\({name}\).*\[(.*)\]", output("readelf", "--dynamic", path))

    core = installed.package / "_core.abi3.so"
    assert entry(core, "RUNPATH") == ["$ORIGIN/lib"]
    assert f"libsllm-ggml-base-{tag}.so" in entry(core, "NEEDED")
    for path in installed.lib.iterdir():
        assert entry(path, "RUNPATH") == ["$ORIGIN"]
        assert [n for n in entry(path, "NEEDED") if "ggml" in n and tag not in n] == []


# --- variants ---

TEXTS = """
import json, os, sys
import sllm
from sllm import embedded
from sllm.engine import backends, cpu
exact = dict(n_ctx=256, n_threads=1, flash_attn=True, type_k="q8_0", type_v="q8_0")
sampling = sllm.SamplingParams(temperature=0.8, seed=3)
with sllm.LocalTarget(embedded.TARGET, **exact) as target, sllm.Model(embedded.DRAFT) as draft:
    options = dict(sampling=sampling, max_tokens=48)
    plain = sllm.generate(target, "Once upon a time", **options).text()
    drafted = sllm.generate(target, "Once upon a time", draft=draft, **options).text()
loaded = {line.split("/")[-1] for line in map(str.strip, open("/proc/self/maps")) if line.endswith(".so")}
print(json.dumps({
    "file": sllm.__file__,
    "variant": cpu.choose().variant.name,
    "kind": cpu.build().kind,
    "plain": plain,
    "drafted": drafted,
    "loaded": sorted(name for name in loaded if "ggml" in name),
    "modules": [[m.name, m.origin, m.error] for m in backends.load()],
}))
"""

REFUSED = """
import json
try:
    import sllm
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_every_variant_that_this_cpu_can_run_is_exact(installed: Installed) -> None:
    """A draft changes nothing about the text, whichever kernels compute it."""
    built = installed.run(
        "import json; from sllm.engine import cpu;"
        "print(json.dumps([[v.name, v.needs, v.path is not None] for v in cpu.build().variants]))"
    )
    have = set(cpu.features())
    able = [name for name, needs, there in built if there and set(needs) <= have]
    assert able
    best = installed.run(TEXTS)
    assert best["kind"] == "portable"
    assert Path(best["file"]).is_relative_to(installed.package)
    assert best["variant"] == able[0]
    tag = sllm.llama_cpp_commit[:9]
    for name in able:
        result = installed.run(TEXTS, SLLM_CPU_VARIANT=name)
        assert result["variant"] == name
        assert len(result["plain"]) > 50
        assert result["drafted"] == result["plain"]
        ours = {f"libsllm-ggml-base-{tag}.so", f"libsllm-ggml-{tag}.so", "libsllm-ggml-rpc.so"}
        assert set(result["loaded"]) == {f"libsllm-ggml-cpu-{name}.so"} | ours


SUITE = """
import json, sys
import pytest
status = pytest.main(sys.argv[1:])
print()
print(json.dumps(int(status)))
sys.exit(status)
"""


def test_the_tests_of_exactness_pass_with_every_variant(installed: Installed) -> None:
    """Parts against the whole, batches against single rows, drafts against none."""
    built = installed.run(
        "import json; from sllm.engine import cpu;"
        "print(json.dumps([[v.name, v.needs] for v in cpu.build().variants if v.path]))"
    )
    for name, needs in built:
        if set(needs) <= set(cpu.features()):
            files = [ROOT / f"tests/engine/test_{part}.py" for part in ("exact", "layers", "speculate")]
            options: list[str | Path] = [
                "-q",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                str(ROOT),
                "-c",
                ROOT / "pyproject.toml",
            ]
            assert installed.run(SUITE, *options, *files, SLLM_CPU_VARIANT=name) == 0, name


def test_a_variant_of_another_cpu_is_refused(installed: Installed) -> None:
    names = installed.run(
        "import json; from sllm.engine import cpu;"
        "print(json.dumps([[v.name, v.needs] for v in cpu.build().variants if v.path]))"
    )
    unable = [name for name, needs in names if not set(needs) <= set(cpu.features())]
    if not unable:
        pytest.skip("this CPU can run all of them")
    message = installed.run(REFUSED, SLLM_CPU_VARIANT=unable[0])
    assert f"the variant {unable[0]!r}" in message
    assert "does not have" in message


# --- other ggmls in the process ---

STRANGER = """
import ctypes, json, sys
when, path = sys.argv[1:3]
if when == "first":
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
import sllm
from sllm import embedded
if when == "second":
    sllm.Model(embedded.DRAFT).close()
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
with sllm.LocalTarget(embedded.DRAFT, n_ctx=64, n_threads=1) as target:
    print(json.dumps(sllm.generate(target, "Once", max_tokens=8).text()))
"""


@pytest.fixture(scope="session")
def stranger(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that has every name of ggml's and llama.cpp's, all of which end the process."""
    folder = tmp_path_factory.mktemp("stranger")
    source = ROOT / "vendor/llama.cpp/source"
    names = set()
    for header in [
        *source.glob("ggml/include/*.h"),
        *source.glob("ggml/src/*.h"),
        source / "include/llama.h",
    ]:
        names.update(re.findall(r"\b((?:ggml|gguf|llama)_\w+)\s*\(", header.read_text(encoding="utf-8")))
    names -= {"ggml_backend_init", "ggml_backend_score"}
    assert len(names) > 700
    lines = ["void abort(void);", *(f"void {name}(void) {{ abort(); }}" for name in sorted(names))]
    (folder / "stranger.c").write_text("\n".join(lines), encoding="utf-8")
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-w", "-o", "libggml-base.so", "stranger.c"], cwd=folder, check=True
    )
    return folder / "libggml-base.so"


@pytest.mark.parametrize("when", ["first", "second"])
def test_another_ggml_in_the_process_is_another_one(installed: Installed, stranger: Path, when: str) -> None:
    assert installed.run(STRANGER, when, stranger)


def test_no_module_comes_from_the_current_folder(copied: Installed, stranger: Path, tmp_path: Path) -> None:
    """As llama.cpp itself would look there, and beside the interpreter."""
    for folder in (copied.site.parent, copied.python.parent):
        for name in ("libggml-cpu-haswell.so", "libggml-cpu.so", "libsllm-ggml-cpu-haswell.so"):
            shutil.copy(stranger, folder / name)
    result = copied.run(TEXTS, GGML_BACKEND_PATH=str(stranger))
    assert all("libsllm" in name for name in result["loaded"])


# --- packages that bring backends ---


def move_into_package(copied: Installed, pattern: str) -> Path:
    package = copied.site / "sllm_backend_moved"
    package.mkdir()
    (package / "__init__.py").touch()
    info = copied.site / "sllm_backend_moved-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sllm-backend-moved\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sllm.backends]\nmoved = sllm_backend_moved\n")
    for path in copied.lib.glob(pattern):
        shutil.move(path, package / path.name)
    return package


def test_the_kernels_may_be_a_package_of_their_own(copied: Installed) -> None:
    move_into_package(copied, "libsllm-ggml-cpu-*.so")
    result = copied.run(TEXTS)
    assert result["drafted"] == result["plain"]
    assert f"libsllm-ggml-cpu-{result['variant']}.so" in result["loaded"]


def test_another_backend_may_be_a_package_of_its_own(copied: Installed) -> None:
    move_into_package(copied, "libsllm-ggml-rpc.so")
    result = copied.run(TEXTS)
    assert ["rpc", "moved", None] in result["modules"]


def test_a_backend_of_another_build_is_left_out(copied: Installed) -> None:
    package = move_into_package(copied, "libsllm-ggml-rpc.so")
    tag = sllm.llama_cpp_commit[:9].encode()
    module = package / "libsllm-ggml-rpc.so"
    data = module.read_bytes()
    assert tag in data
    module.write_bytes(data.replace(b"base-" + tag, b"base-" + bytes(reversed(tag))))
    result = copied.run(TEXTS, PYTHONWARNINGS="error")
    ((name, origin, error),) = [m for m in result["modules"] if m[1] == "moved"]
    assert (name, origin) == ("rpc", "moved")
    assert "libsllm-ggml-base-" in error
    assert result["drafted"] == result["plain"]


def test_without_kernels_it_says_so(copied: Installed) -> None:
    for path in copied.lib.glob("libsllm-ggml-cpu-*.so"):
        path.unlink()
    assert "has no kernels" in copied.run(REFUSED)


# --- CPUs that this machine does not have ---

QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
EMULATED = {"OPENBLAS_CORETYPE": "Nehalem"}
"""NumPy's own OpenBLAS takes some emulated CPUs on some hosts for newer ones, and ends with an illegal
instruction. These kernels run everywhere."""

WHICH = """
import json
try:
    import sllm
except ImportError as error:
    print(json.dumps(["refused", str(error)]))
else:
    from sllm import embedded
    from sllm.engine import cpu
    exact = dict(n_ctx=64, n_threads=1, flash_attn=True, type_k="q8_0", type_v="q8_0")
    with sllm.LocalTarget(embedded.DRAFT, **exact) as target:
        text = sllm.generate(target, "Once", max_tokens=6).text()
    print(json.dumps([cpu.choose().variant.name, text]))
"""


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)")
@pytest.mark.parametrize(
    ("model", "features"),
    [
        ("Nehalem", {"sse4_2"}),
        ("SandyBridge", {"sse4_2", "avx"}),
        ("IvyBridge", {"sse4_2", "avx", "f16c"}),
        ("Haswell", {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi2"}),
    ],
)
def test_an_emulated_cpu_gets_its_variant(installed: Installed, model: str, features: set[str]) -> None:
    """Whatever the build has for such a CPU; it computes there, with nothing that the CPU lacks."""
    assert QEMU is not None
    built = installed.run(
        "import json; from sllm.engine import cpu;"
        "print(json.dumps([[v.name, v.needs] for v in cpu.build().variants if v.path]))"
    )
    able = [name for name, needs in built if set(needs) <= features]
    # QEMU says on stderr which features it cannot emulate, once for each.
    chosen, text = installed.run(WHICH, runner=[QEMU, "-cpu", model], **EMULATED)
    if able:
        assert chosen == able[0]
        assert text
    else:
        assert chosen == "refused"


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)")
def test_a_native_build_on_an_older_cpu_is_refused_in_words(tmp_path: Path) -> None:
    """This very installation, where it needs more than a CPU of 2008 has."""
    assert QEMU is not None
    if cpu.build().kind != "native" or set(cpu.choose().variant.needs) <= {
        "sse3",
        "ssse3",
        "sse4_1",
        "sse4_2",
    }:
        pytest.skip("this installation runs on such a CPU")
    result = subprocess.run(
        [QEMU, "-cpu", "Nehalem", sys.executable, "-c", WHICH],
        cwd=tmp_path,
        env=environment(**EMULATED),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kind, message = json.loads(result.stdout.splitlines()[-1])
    assert kind == "refused"
    assert "(native, compiled by" in message
    assert "avx" in message
