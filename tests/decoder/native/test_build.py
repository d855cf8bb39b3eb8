"""Building the kernels: without a compiler, with a broken one, and a library of other sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.decoder.ops.native import build, lib
from tests.native_kernels import build_if_stale


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match="install gcc or clang"):
        build.build(tmp_path / "kernels.so")


def test_a_broken_compiler_is_an_error_that_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildError, match="false"):
        build.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    with pytest.raises(build.BuildError, match="does not start"):
        build.build(tmp_path / "kernels.so")
    assert not (tmp_path / "kernels.so").exists()


def test_an_absent_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"python -m services\.decoder\.ops\.native\.build"):
        lib.load(tmp_path / "absent.so")


def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy(build.LIBRARY, copy)
    lib.load(copy)
    monkeypatch.setattr(build, "source_hash", lambda: "0123456789abcdef")
    with pytest.raises(OSError, match="older than its sources"):
        lib.load(copy)


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library as it is when a source was changed since."""
    library = tmp_path / "stale.so"
    now = build.source_hash().encode()
    library.write_bytes(build.LIBRARY.read_bytes().replace(now, b"0" * len(now)))
    monkeypatch.setattr(build, "LIBRARY", library)
    lib.kernels.cache_clear()
    yield library
    lib.kernels.cache_clear()


def test_the_tests_build_kernels_that_are_older_than_their_sources(
    stale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, built = (build.PACKAGE_DIR / "libleasehold_kernels.so").read_bytes(), list[Path]()

    def compile_to(target: Path) -> Path:
        built.append(target)
        target.with_suffix(".new").write_bytes(current)
        return target.with_suffix(".new").replace(target)

    monkeypatch.setattr(build, "build", compile_to)
    assert build_if_stale() == ""
    assert built == [stale]
    assert build_if_stale() == ""
    assert built == [stale], "once"


def test_sources_that_do_not_compile_fail_the_tests(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildError, match="false"):
        build_if_stale()


def test_kernels_that_stay_stale_fail_the_tests(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda target: target)
    with pytest.raises(OSError, match="older than its sources"):
        build_if_stale()


def test_without_a_compiler_old_kernels_are_a_reason_to_skip(
    stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    reason = build_if_stale()
    assert f"{stale} is absent or older than its sources" in reason
    assert "no C compiler is on the PATH" in reason


def test_the_library_needs_nothing_of_python_or_numpy() -> None:
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("there is no ldd")
    needed = subprocess.run([ldd, str(build.LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert not any(word in needed for word in ("python", "numpy", "mlx", "not found"))


def test_the_backend_imports_without_mlx() -> None:
    code = (
        "import sys; sys.modules['mlx'] = None; sys.modules['mlx.core'] = None\n"
        "from services.decoder.ops.native import NativeOps; print(NativeOps().numerics_id)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("native-fast-")
