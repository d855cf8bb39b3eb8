"""Compiles the kernels: `python -m services.decoder.ops.native.build`, and hatch_build.py for wheels and images.

Standard library only, and no import of the package: the build hook loads this file by its path. The files `src/k_*.c` are
compiled once for each instruction set that the machine's architecture knows; the library chooses among them at run time, so
what ships runs on every processor of the architecture.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
SOURCE_DIR = PACKAGE_DIR / "src"
LIBRARY = PACKAGE_DIR / "libleasehold_kernels.so"

# Contraction would fuse products where the source does not say so, and differently from one instruction set to the next.
COMMON_FLAGS = ("-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# By machine: each instruction set of src/simd.h with the flags that allow it.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "plain": (),
        "avx2": _AVX2,
        "vnni": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
    },
    "aarch64": {"plain": (), "neon": ("-march=armv8.2-a+dotprod",)},
}


class BuildError(Exception):
    """The kernels cannot be compiled here; says why."""


def source_hash() -> str:
    """Names the sources, so that a library of other sources is noticed. Empty when they are not installed."""
    if not SOURCE_DIR.is_dir():
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(SOURCE_DIR.glob("*.[ch]")):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def find_compiler() -> list[str]:
    """The command of the system's C compiler, $CC first; raises BuildError when there is none."""
    chosen = os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return [path]
    raise BuildError("no C compiler is on the PATH; install gcc or clang")


def build(
    target: Path = LIBRARY, *, machine: str | None = None, optimise: tuple[str, ...] = (), link: tuple[str, ...] = ()
) -> Path:
    """Compiles and links into target; extra flags are for sanitizers. Raises BuildError."""
    compiler = find_compiler()
    sets = INSTRUCTION_SETS.get(machine or platform.machine(), {"plain": ()})
    with tempfile.TemporaryDirectory(prefix="leasehold-kernels-") as work_dir:
        commands = _compile_commands(compiler, sets, Path(work_dir), optimise)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        objects = [command[-1] for command in commands]
        _run([*compiler, "-shared", "-pthread", *optimise, *link, "-o", str(unfinished), *objects, "-lm"])
        unfinished.replace(target)  # a process that has the old one mapped keeps it
    return target


def _compile_commands(
    compiler: list[str], sets: dict[str, tuple[str, ...]], work_dir: Path, optimise: tuple[str, ...]
) -> list[list[str]]:
    commands = []
    # Kernels first: they take longest.
    for path in sorted(SOURCE_DIR.glob("*.c"), key=lambda path: (not path.name.startswith("k_"), path.name)):
        variants = sets.items() if path.name.startswith("k_") else [("", ())]
        for name, flags in variants:
            level = "-O2" if name in ("", "plain") else "-O3"
            define = [f"-DLH_ISA_{name}"] if name else [f'-DLH_SOURCE_HASH="{source_hash()}"']
            output = work_dir / f"{path.stem}_{name}.o"
            commands.append([*compiler, *COMMON_FLAGS, level, *flags, *define, *optimise, "-c", str(path), "-o"])
            commands[-1].append(str(output))
    return commands


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start ({error})") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


def main() -> int:
    """Builds in place, for editable installs."""
    try:
        print(f"built {build()}")
    except BuildError as error:
        print(
            f"the native kernels are not built, the decoder will fall back to --backend mlx: {error}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
