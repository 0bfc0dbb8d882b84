"""The look at the CPU before any kernel runs, and the choice among variants; on whatever CPU this is."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples
from processes import environment
from sllm._cpu import lib as cpu_lib

from sllm.engine import backends, cpu
from sllm.engine._ffi import ffi, lib
from sllm.errors import BackendError, SllmError, UnsupportedCPUError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parents[2]

OLD = ("sse4_2",)
MIDDLE = ("sse4_2", "avx", "f16c", "fma", "avx2", "bmi2")
NEW = (*MIDDLE, "avx512f", "avx512vl")


def variants(folder: Path | None = None) -> tuple[cpu.Variant, ...]:
    """Three made-up variants, best first, with files in ``folder``."""
    made = []
    for name, needs in (("new", NEW), ("middle", MIDDLE), ("old", OLD), ("any", ())):
        path = None
        if folder is not None:
            path = folder / f"{cpu.PREFIX}cpu-{name}.so"
            path.touch()
        made.append(cpu.Variant(name, needs, path))
    return tuple(made)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Lets the build and the CPU be others."""
    monkeypatch.delenv(cpu.VARIABLE, raising=False)

    def as_if(
        features: Iterable[str], kind: str = "portable", available: Iterable[str] | None = None
    ) -> None:
        made = variants(tmp_path)
        if available is not None:
            made = tuple(v if v.name in available else replace(v, path=None) for v in made)
        if kind != "portable":
            made = (cpu.Variant(kind, MIDDLE),)
        built = cpu.Build(kind, "GNU 12.2.0", amx=False, tag="0c1e57098", variants=made)
        monkeypatch.setattr(cpu, "build", lambda: built)
        monkeypatch.setattr(cpu, "features", lambda: tuple(sorted({"sse2", *features})))
        monkeypatch.setattr(cpu, "brand", lambda: "Made-up CPU")

    return as_if


# --- this CPU and this build ---


def test_this_build_runs_here() -> None:
    built = cpu.build()
    assert built.kind in ("native", "portable", "generic", "system")
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", built.compiler)
    choice = cpu.choose()
    assert choice.variant.name in {variant.name for variant in built.variants}
    assert set(choice.variant.needs) <= set(cpu.features()) or not cpu.features()
    assert [len(v.needs) for v in built.variants] == sorted(
        (len(v.needs) for v in built.variants), reverse=True
    )


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="compares with Linux's list for x86-64"
)
def test_features_are_those_that_linux_lists() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).partition(":")[2].split())
    flags |= {"sse3"} if "pni" in flags else set()
    source = (ROOT / "csrc/cpu.c").read_text(encoding="utf-8")
    known = set(re.findall(r'\{"(\w+)", LEAF', source))
    assert len(known) > 25
    # avx_vnni_int8 is in no list of Linux's: not worth a place there, its maintainers say
    assert set(cpu.features()) - {"avx_vnni_int8"} == known & flags


def test_without_amx_the_kernels_do_not_use_it() -> None:
    if not cpu.build().amx:
        assert not [f for v in cpu.build().variants for f in v.needs if f.startswith("amx")]


# --- the choice ---


def test_the_best_that_the_cpu_can_run(pretend: Callable[..., None]) -> None:
    pretend(NEW)
    assert cpu.choose().variant.name == "new"
    assert cpu.choose().passed_over == ()
    pretend(MIDDLE)
    choice = cpu.choose()
    assert choice.variant.name == "middle"
    assert [(v.name, missing) for v, missing in choice.passed_over] == [("new", ("avx512f", "avx512vl"))]
    assert choice.reason == "the best of 4 that this CPU can run"
    pretend(())
    assert cpu.choose().variant.name == "any"


@given(st.sets(st.sampled_from(NEW)))
@examples(50)
def test_no_choice_needs_what_is_not_there(features: set[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cpu.VARIABLE, raising=False)
        patch.setattr(cpu, "features", lambda: ("sse2", *features))
        made = variants()
        patch.setattr(cpu, "build", lambda: cpu.Build("generic", "GNU 12.2.0", False, "", made))
        choice = cpu.choose()
    assert set(choice.variant.needs) <= features
    assert all(set(missing) == set(v.needs) - features for v, missing in choice.passed_over)


def test_what_is_not_installed_is_not_chosen(pretend: Callable[..., None]) -> None:
    pretend(NEW, available={"old", "any"})
    assert cpu.choose().variant.name == "old"


def test_a_variable_forces_a_variant(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(NEW)
    monkeypatch.setenv(cpu.VARIABLE, "old")
    choice = cpu.choose()
    assert (choice.variant.name, choice.reason) == ("old", f"${cpu.VARIABLE} says so")
    monkeypatch.setenv(cpu.VARIABLE, "")  # as good as none
    assert cpu.choose().variant.name == "new"


def test_a_variant_that_there_is_not(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(NEW)
    monkeypatch.setenv(cpu.VARIABLE, "newest")
    with pytest.raises(
        UnsupportedCPUError, match=r"SLLM_CPU_VARIANT is 'newest', and .* has new, middle, old"
    ):
        cpu.choose()


def test_a_variant_that_the_cpu_cannot_run(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(MIDDLE)
    monkeypatch.setenv(cpu.VARIABLE, "new")
    with pytest.raises(
        UnsupportedCPUError,
        match=r"the variant 'new' of .*Made-up CPU.*: avx512f, avx512vl; unset \$SLLM_CPU_VARIANT",
    ):
        cpu.choose()


def test_a_build_for_another_cpu_says_what_is_missing_and_what_to_do(pretend: Callable[..., None]) -> None:
    pretend(OLD, kind="native")
    with pytest.raises(UnsupportedCPUError) as caught:
        cpu.choose()
    text = str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, SllmError)
    for words in ("native", "GNU 12.2.0", "Made-up CPU", "avx, f16c, fma, avx2, bmi2", "SLLM_PORTABLE=ON"):
        assert words in text
    assert "pip install --force-reinstall" in text


def test_an_architecture_of_which_nothing_is_known_is_trusted(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend((), kind="native")
    monkeypatch.setattr(cpu, "features", lambda: ())
    assert cpu.choose().variant.name == "native"


def test_no_kernels_at_all(pretend: Callable[..., None]) -> None:
    pretend(NEW, available=())
    with pytest.raises(
        UnsupportedCPUError, match=r"has no kernels: no libsllm-ggml-cpu-\*\.so in .*sllm\.backends"
    ):
        cpu.choose()


GUARD = """
import sys, types
from importlib.machinery import ModuleSpec
fake = types.ModuleType("sllm._cpu")
fake.__file__ = "/nowhere/_cpu.so"
texts = {
    "sllm_cpu_features": b"sse2 sse3",
    "sllm_cpu_brand": b"Old CPU",
    "sllm_build_kind": b"native",
    "sllm_build_compiler": b"GNU 12.2.0",
    "sllm_build_needs": b"sse3 avx2",
    "sllm_build_variants": b"",
    "sllm_build_tag": b"",
    "sllm_build_amx": 0,
}
fake.lib = types.SimpleNamespace(**{name: (lambda text=text: text) for name, text in texts.items()})
fake.ffi = types.SimpleNamespace(string=lambda text: text)
sys.modules["sllm._cpu"] = fake
try:
    import sllm
except ImportError as error:
    print(type(error).__name__, error)
print("sllm._core" in sys.modules)
"""


def test_the_extension_is_not_even_loaded_where_its_kernels_cannot_run(tmp_path: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-c", GUARD],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = output.stdout.splitlines()
    assert first.startswith("UnsupportedCPUError this build of sllm (native, compiled by GNU 12.2.0)")
    assert "this CPU (Old CPU) does not have: avx2" in first
    assert second == "False"


def test_an_unknown_variant_is_an_import_error_and_no_traceback_of_c(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import sllm"],
        cwd=tmp_path,
        env=environment(SLLM_CPU_VARIANT="nosuch"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "SLLM_CPU_VARIANT is 'nosuch', and this build of sllm" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("checkout", [True, False])
def test_without_the_compiled_part_it_says_where_one_is(tmp_path: Path, checkout: bool) -> None:
    """In the source tree, and in an installation that is broken."""
    package = Path(cpu.__file__).parents[1]
    ignored = shutil.ignore_patterns("*.so", "*.gguf", "lib", "__pycache__")
    shutil.copytree(package, tmp_path / "sllm", ignore=ignored)
    if checkout:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "pyproject.toml").touch()
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import sllm"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    if checkout:
        assert "is sllm's source tree" in last
        assert "pip install ." in last
    else:
        assert f"the compiled part of sllm is missing in {tmp_path / 'sllm'}" in last
        assert sys.executable in last


# --- modules and packages that bring them ---


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "made_up_backend") -> Path:
    """An installed package with an entry point of ours; its folder."""
    there = folder / name
    there.mkdir(parents=True)
    (there / "__init__.py").touch()
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{cpu.GROUP}]\nmade-up = {name}\n")
    monkeypatch.syspath_prepend(str(folder))
    return there


def test_packages_bring_variants(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = package(tmp_path / "site", monkeypatch)
    (there / f"{cpu.PREFIX}cpu-middle.so").touch()
    pretend(NEW, available=())
    assert cpu.choose().variant.path == there / f"{cpu.PREFIX}cpu-middle.so"
    assert ("made-up", there) in cpu.module_folders()


def test_only_a_portable_build_looks_for_packages(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package(tmp_path / "site", monkeypatch)
    pretend(NEW, kind="native")
    assert cpu.module_folders() == []


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The loader with a folder of its own and a linker that takes what is not called broken."""
    folder = tmp_path / "lib"
    folder.mkdir()
    state = SimpleNamespace(folder=folder, asked=[])

    def load(path: object) -> int:
        name = Path(ffi.string(path).decode()).name
        state.asked.append(name)
        return int(lib.SLLM_ERR_LOAD if "broken" in name else lib.SLLM_OK)

    fake = SimpleNamespace(sllm_backend_load=load, SLLM_OK=0)
    monkeypatch.setattr(backends, "_loaded", None)
    monkeypatch.setattr(cpu, "module_folders", lambda: [("sllm", folder)])
    state.use = lambda: monkeypatch.setattr(backends, "lib", SimpleNamespace(**vars(fake), SLLM_ERR_LOAD=2))
    return state


def test_the_cpu_comes_last_and_a_broken_backend_is_left_out(
    pretend: Callable[..., None],
    loading: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretend(MIDDLE)
    names = ("rpc", "cuda-broken", "cpu-new", "cpu-old", "base-0c1e57098", "0c1e57098")
    for name in names:
        (loading.folder / f"{cpu.PREFIX}{name}.so").touch()
    loading.use()
    modules = backends.load()
    assert [m.name for m in modules] == ["cuda-broken", "rpc", "cpu-middle"]
    assert [m.error is None for m in modules] == [False, True, True]
    assert "cuda-broken of sllm is left out" in caplog.text
    assert backends.load() is modules
    assert len(loading.asked) == 3


def test_kernels_that_cannot_be_loaded_are_an_error(
    pretend: Callable[..., None], loading: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(MIDDLE)
    broken = cpu.Variant("broken", MIDDLE, loading.folder / f"{cpu.PREFIX}cpu-broken.so")
    monkeypatch.setattr(cpu, "choose", lambda: cpu.Choice(broken, "", ()))
    loading.use()
    with pytest.raises(BackendError, match="kernels cannot be loaded"):
        backends.load()
    with pytest.raises(BackendError):  # not half loaded
        backends.load()


def test_a_path_that_is_no_module(tmp_path: Path) -> None:
    """The real function, in a child: what it would load stays loaded."""
    (tmp_path / "text.so").write_text("no module\n")
    code = (
        "import sys; from sllm.engine._ffi import check, ffi, lib\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        check(lib.sllm_backend_load(name.encode()), name)\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text.so"), str(tmp_path / "absent.so"), ""],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert "text.so: " in lines[0]
    assert "failed to load" in lines[0]
    assert "absent.so" in lines[1]


# --- names that nobody else has ---


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prefix_symbols", ROOT / "cmake/prefix_symbols.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_exported_name_gets_a_prefix(tmp_path: Path) -> None:
    script: Any = load_script()
    (tmp_path / "include").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "include/ggml.h").write_text(
        """
        #define GGML_API extern
        // GGML_API void ggml_in_a_comment(void);
        /* GGML_API void ggml_in_another(void); */
        GGML_API void ggml_plain(void);
        GGML_API struct ggml_context * ggml_of_a_struct (struct ggml_init_params params);
        GGML_API const char * gguf_on_two_lines(
                const struct gguf_context * ctx);
        GGML_API GGML_NORETURN void ggml_with_attributes(const char * file) __attribute__((noreturn));
        typedef int (*ggml_callback)(void);
        GGML_API float ggml_table_of_numbers[1 << 16];
        GGML_API size_t quantize_some(const float * GGML_RESTRICT src);
        void ggml_not_exported(void);
        """
    )
    (tmp_path / "src/ggml-impl.h").write_text(
        """
        #define GGML_IMPL(name) \\
            GGML_BACKEND_API int ggml_in_a_macro(void);
        GGML_BACKEND_API int ggml_backend_score(void);
        GGML_BACKEND_API int ggml_backend_other(void);
        """
    )
    assert script.exported_names(tmp_path) == {
        "ggml_plain",
        "ggml_of_a_struct",
        "gguf_on_two_lines",
        "ggml_with_attributes",
        "ggml_table_of_numbers",
        "quantize_some",
        "ggml_backend_other",
    }


def test_the_names_of_the_c_functions_are_those_of_the_header() -> None:
    header = (ROOT / "csrc/cpu.h").read_text(encoding="utf-8")
    assert set(re.findall(r"\b(sllm_\w+)\(void\)", header)) == set(dir(cpu_lib))
