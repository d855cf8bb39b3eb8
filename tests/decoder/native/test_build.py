"""Building the kernels: without a compiler, with a broken one, and a library of other sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.decoder.ops.native import build, lib


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
