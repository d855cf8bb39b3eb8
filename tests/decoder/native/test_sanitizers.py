"""The kernel tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and the NEON build under qemu-user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.decoder.ops.native import build

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNEL_TESTS = [str(HERE / name) for name in ("test_linear.py", "test_moe.py", "test_attention.py", "test_sampling.py")]


def _runtime(library: str) -> str:
    """The path of a sanitizer's runtime, to be loaded before Python's own allocator."""
    compiler = build.find_compiler()
    path = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    found = path.stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {library}")
    return found


def _run_kernel_tests(library: Path, environment: dict[str, str], selection: str = "") -> None:
    # A plugin replaces the library's path before any test imports the kernels.
    (library.parent / "use_library.py").write_text(
        f"from pathlib import Path\nfrom services.decoder.ops.native import build\nbuild.LIBRARY = Path({str(library)!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "use_library"]
    path = os.pathsep.join([str(library.parent), str(ROOT)])
    done = subprocess.run(
        [*command, "--timeout", "1500", "-k", selection or "test", *KERNEL_TESTS],
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    reports = "".join(path.read_text() for path in library.parent.glob("races.*"))
    assert not reports, reports
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    # Tests that could not load the library would be skipped, and name it.
    assert " passed" in done.stdout, done.stdout[-4000:]
    assert str(library) not in done.stdout, done.stdout[-4000:]


@pytest.mark.timeout(1800)
def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    flags = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=undefined")
    library = build.build(tmp_path / "kernels.so", optimise=flags)
    environment = {"LD_PRELOAD": _runtime("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    _run_kernel_tests(library, environment)


@pytest.mark.timeout(1800)
def test_threads(tmp_path: Path) -> None:
    library = build.build(tmp_path / "kernels.so", optimise=("-g", "-O1", "-fsanitize=thread"))
    options = f"halt_on_error=1 exitcode=66 log_path={tmp_path / 'races'}"  # pytest would swallow the report
    # The references' OpenBLAS synchronises in ways that the sanitizer cannot see.
    environment = {"LD_PRELOAD": _runtime("libtsan.so"), "TSAN_OPTIONS": options, "OPENBLAS_NUM_THREADS": "1"}
    _run_kernel_tests(library, environment, "alone or company or hot or mixed_batches")


@pytest.mark.timeout(1800)
def test_neon_under_qemu_has_the_bits_of_avx2(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    neon = _compare_isas(tmp_path / "neon", [compiler, "-static"], "aarch64", [emulator, "-cpu", "max"])
    assert neon[0] == "best neon_dotprod"
    here = _compare_isas(tmp_path / "here", build.find_compiler(), os.uname().machine, [])
    if here[0] != "best plain":
        assert neon[1:] == here[1:]


def _compare_isas(work_dir: Path, compiler: list[str], machine: str, emulator: list[str]) -> list[str]:
    """What compare_isas.c prints: the best set's name and its results' checksums. It fails where plain C disagrees."""
    work_dir.mkdir()
    objects = []
    for path in build.SOURCE_DIR.glob("*.c"):
        sets = build.INSTRUCTION_SETS.get(machine, {"plain": ()}) if path.name.startswith("k_") else {"": ()}
        for isa, flags in sets.items():
            objects.append(str(work_dir / f"{path.stem}_{isa}.o"))
            define = f"-DLH_ISA_{isa}" if isa else '-DLH_SOURCE_HASH="test"'
            command = [*compiler, *build.COMMON_FLAGS, "-O2", *flags, define, "-c", str(path), "-o", objects[-1]]
            subprocess.run(command, check=True)
    program, source = str(work_dir / "compare"), str(HERE / "compare_isas.c")
    subprocess.run([*compiler, "-pthread", f"-I{build.SOURCE_DIR}", source, *objects, "-lm", "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
