"""CRC-32 of blocks in GPU memory, computed there: the manager and its workers run the same kernel, through the driver alone.

`python -m services.cuda_checksum` makes cuda_checksum.ptx anew from cuda_checksum.cu; it needs nvcc, and no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cu")
PTX = Path(__file__).with_suffix(".ptx")
NUM_THREADS = 8192  # for each block of the pool; the tables depend on it
_THREADS_A_BLOCK = 256
_MAX_BLOCKS = 64  # of the pool, in one launch
_POLYNOMIAL = 0xEDB88320
_ONE = 0x80000000  # x^0, reflected


def multiply(a: int, b: int) -> int:
    """a * b modulo CRC-32's polynomial, bits reflected: the kernel's own function in Python."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def powers(num_threads: int) -> tuple[int, ...]:
    """x^(32 d) for d from 0 to num_threads."""
    word, power, found = _ONE, _ONE, [_ONE]
    for _ in range(32):
        word = word >> 1 ^ (_POLYNOMIAL if word & 1 else 0)
    times_word = [tuple(multiply(byte << 8 * place, word) for byte in range(256)) for place in range(4)]
    for _ in range(num_threads):
        power = _by_table(times_word, power)
        found.append(power)
    return tuple(found)


def tables(num_threads: int) -> tuple[int, ...]:
    """Each byte of a word times x^(32 num_threads): 4 tables of 256, one behind the other."""
    stride = powers(num_threads)[-1]
    return tuple(multiply(byte << 8 * place, stride) for place in range(4) for byte in range(256))


def _by_table(table: Sequence[Sequence[int]], word: int) -> int:
    return table[0][word & 255] ^ table[1][word >> 8 & 255] ^ table[2][word >> 16 & 255] ^ table[3][word >> 24]


@cache
def constant_part(num_bytes: int) -> int:
    """What CRC-32 is beside its linear part: that of so many zeros."""
    crc, zeros = 0, bytes(1 << 16)
    for start in range(0, num_bytes, len(zeros)):
        crc = zlib.crc32(zeros[: num_bytes - start], crc)
    return crc


class ChecksumKernel:
    """The kernel with its tables on one device (services.cuda_memory.CudaDevice). Any thread may call it."""

    def __init__(self, device: Any) -> None:
        """Raises CudaError where the driver cannot compile the kernel."""
        self._device = device
        self._lock = threading.Lock()
        device.make_current()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        device.call("cuModuleLoadData", ctypes.byref(module), PTX.read_bytes() + b"\0")
        device.call("cuModuleGetFunction", ctypes.byref(self._function), module, b"leasehold_crc32")
        self._stream = device.make_stream()
        self._tables = self._upload(tables(NUM_THREADS))
        self._powers = self._upload(powers(NUM_THREADS))
        self._addresses = device.allocate(8 * _MAX_BLOCKS)
        self._sums = device.allocate(4 * _MAX_BLOCKS)

    def checksums(self, addresses: Sequence[int], num_bytes: int) -> list[int]:
        """zlib.crc32 of num_bytes bytes, a multiple of 4, at each address; waits for the device."""
        if num_bytes % 4:
            raise ValueError(f"{num_bytes} bytes are not a multiple of 4")
        found: list[int] = []
        with self._lock:
            self._device.make_current()
            for first in range(0, len(addresses), _MAX_BLOCKS):
                found += self._launch(addresses[first : first + _MAX_BLOCKS], num_bytes // 4)
        constant = constant_part(num_bytes)
        return [linear ^ constant for linear in found]

    def _launch(self, addresses: Sequence[int], num_words: int) -> list[int]:
        call, count = self._device.call, len(addresses)
        values = (ctypes.c_uint64 * count)(*addresses)
        sums = (ctypes.c_uint32 * count)()
        where, there = ctypes.c_uint64(self._addresses), ctypes.c_uint64(self._sums)
        call("cuMemcpyHtoDAsync_v2", where, values, ctypes.c_size_t(8 * count), self._stream)
        call("cuMemsetD32Async", there, ctypes.c_uint(0), ctypes.c_size_t(count), self._stream)
        arguments = (
            where,
            ctypes.c_uint64(num_words),
            ctypes.c_uint64(self._tables),
            ctypes.c_uint64(self._powers),
            there,
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid = (NUM_THREADS // _THREADS_A_BLOCK, count, 1)
        call("cuLaunchKernel", self._function, *grid, _THREADS_A_BLOCK, 1, 1, 0, self._stream, pointers, None)
        call("cuMemcpyDtoHAsync_v2", sums, there, ctypes.c_size_t(4 * count), self._stream)
        call("cuStreamSynchronize", self._stream)
        return list(sums)

    def _upload(self, words: Sequence[int]) -> int:
        values = (ctypes.c_uint32 * len(words))(*words)
        address: int = self._device.allocate(ctypes.sizeof(values))
        size = ctypes.c_size_t(ctypes.sizeof(values))
        self._device.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), values, size)
        return address


def source_digest() -> str:
    """Names the text of cuda_checksum.cu; the first line of cuda_checksum.ptx has it."""
    return hashlib.blake2b(SOURCE.read_bytes(), digest_size=8).hexdigest()


def main() -> int:
    """Compiles the source for every GPU from compute capability 7.5 on."""
    done = subprocess.run(
        ["nvcc", "--ptx", "-O3", "-arch=compute_75", "-o", "/dev/stdout", str(SOURCE)], capture_output=True
    )
    sys.stderr.buffer.write(done.stderr)
    if done.returncode == 0:
        # The version that drivers of 2020 know: nothing in it is newer.
        text = done.stdout.decode().replace(".version 9.0", ".version 7.0")
        lines = [line for line in text.splitlines() if not line.startswith("//")]
        PTX.write_text(
            f"// of cuda_checksum.cu {source_digest()}\n" + "\n".join(lines).strip() + "\n", encoding="ascii"
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
