"""The CRC-32 kernel without a GPU: its own source compiled for the host, against zlib. tests/bench/gpu_services.py runs it on one."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from services import cuda_checksum

_HOST = """
#include "{source}"
extern "C" u32 whole(const u32* words, u64 num_words, u32 num_threads, const u32* tables, const u32* powers) {{
    u32 sum = 0;
    for (u32 thread = 0; thread < num_threads; thread++)
        sum ^= thread_sum(words, num_words, thread, num_threads, tables, powers);
    return sum;
}}
"""


def _array(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * len(values))(*values)


def test_the_kernels_source_computes_zlibs_crc32(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    host, library = tmp_path / "host.cpp", tmp_path / "host.so"
    host.write_text(_HOST.format(source=cuda_checksum.SOURCE))
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(host)], check=True)
    whole = ctypes.CDLL(str(library)).whole
    whole.restype = ctypes.c_uint32
    rng = random.Random(0)
    for num_threads in (1, 32, cuda_checksum.NUM_THREADS):
        tables, powers = _array(cuda_checksum.tables(num_threads)), _array(cuda_checksum.powers(num_threads))
        for num_words in (1, num_threads, num_threads + 1, 3 * num_threads - 1, 1000):
            data = rng.randbytes(4 * num_words)
            linear = whole(data, ctypes.c_uint64(num_words), num_threads, tables, powers)
            assert linear ^ cuda_checksum.constant_part(len(data)) == zlib.crc32(data), (num_threads, num_words)


def test_the_shipped_ptx_was_made_of_the_shipped_source() -> None:
    first = cuda_checksum.PTX.read_text().splitlines()[0]
    assert first.endswith(cuda_checksum.source_digest()), "run python -m services.cuda_checksum"
