"""The CUDA driver through ctypes: one device, and memory on it that several processes map.

Nothing but the driver's own library is needed, so the KV manager's image stays small. Importing this touches no GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from services.cuda_checksum import ChecksumKernel

_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class CudaError(OSError):
    """The driver is missing or refused a call."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


def _copy_side(name: str) -> tuple[tuple[str, Any], ...]:
    return (
        (f"{name}_x_bytes", ctypes.c_size_t),
        (f"{name}_y", ctypes.c_size_t),
        (f"{name}_type", ctypes.c_int),
        (f"{name}_host", ctypes.c_void_p),
        (f"{name}_device", ctypes.c_uint64),
        (f"{name}_array", ctypes.c_void_p),
        (f"{name}_pitch", ctypes.c_size_t),
    )


class _Copy2D(ctypes.Structure):
    _fields_ = (*_copy_side("src"), *_copy_side("dst"), ("width_bytes", ctypes.c_size_t), ("height", ctypes.c_size_t))


class CudaDevice:
    """The primary context of one device, which MLX uses too; current on the thread that made this object."""

    def __init__(self, index: int = 0) -> None:
        """Raises CudaError where there is no driver or no such device."""
        self.index = index
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no NVIDIA driver is installed here, or not in this container: {error}") from error
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= index < count.value:
            raise CudaError(f"there is no GPU {index}; {count.value} are visible here, counted from 0")
        handle = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), index)
        self._handle = handle.value
        self._context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self.make_current()

    def make_current(self) -> None:
        """Before any other call on another thread."""
        self.call("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        """As the driver names the device."""
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, 128, self._handle)
        return text.value.decode()

    @property
    def uuid(self) -> str:
        """The same in every process, whatever devices are visible there: 32 hex digits."""
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid_v2", raw, self._handle)
        return bytes(raw).hex()

    @cached_property
    def checksum_kernel(self) -> ChecksumKernel:
        """Compiled when it is first used."""
        return ChecksumKernel(self)

    @cached_property
    def copy_stream(self) -> ctypes.c_void_p:
        """Waits for nothing of MLX's."""
        return self.make_stream()

    def make_stream(self) -> ctypes.c_void_p:
        """A stream that waits for no other, and gives way to others. Never destroyed."""
        lowest, highest, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self.call("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
        self.call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, lowest)
        return stream

    def allocate(self, num_bytes: int) -> int:
        """The address of some GPU memory of this process. Never freed."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def attribute(self, attribute: int) -> int:
        """A CUdevice_attribute."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._handle)
        return value.value

    def call(self, name: str, *arguments: Any) -> None:
        """Calls the driver; raises CudaError with what it says."""
        result = getattr(self._lib, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(result, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({result})")


class SharedGpuMemory:
    """A range of GPU memory behind a file descriptor, mapped into this process. It lives as long as any descriptor or mapping.

    An imported range cannot be exported again, so the descriptor itself is kept and passed on.
    """

    def __init__(self, device: CudaDevice, num_bytes: int, fd: int | None = None) -> None:
        """Makes a new range, or maps that of a descriptor, which this object owns from then on."""
        self._device = device
        self.device_uuid = device.uuid
        prop = _AllocationProp(type=1, handle_types=_POSIX_FD, location=_Location(1, device.index))
        granularity = ctypes.c_size_t()
        device.call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(prop), 0)
        self.num_bytes = -(-num_bytes // granularity.value) * granularity.value
        handle = ctypes.c_uint64()
        size = ctypes.c_size_t(self.num_bytes)
        if fd is None:
            device.call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(prop), ctypes.c_uint64(0))
            exported = ctypes.c_int(-1)
            device.call("cuMemExportToShareableHandle", ctypes.byref(exported), handle, _POSIX_FD, ctypes.c_uint64(0))
            fd = exported.value
            os.set_inheritable(fd, False)
        else:
            device.call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), _POSIX_FD)
        self.fd = fd
        address = ctypes.c_uint64()
        device.call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            size,
            ctypes.c_size_t(0),
            ctypes.c_uint64(0),
            ctypes.c_uint64(0),
        )
        device.call("cuMemMap", address, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
        access = _AccessDesc(_Location(1, device.index), _READ_WRITE)
        device.call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
        device.call("cuMemRelease", handle)  # the mapping and the descriptor keep it
        self.address = address.value

    def checksums(self, offsets: Sequence[int], num_bytes: int) -> list[int]:
        """zlib.crc32 of num_bytes bytes at each offset, computed on the device. From any thread."""
        return self._device.checksum_kernel.checksums([self.address + offset for offset in offsets], num_bytes)

    def copy_rows(self, source: int, target: int, row_bytes: int, pitch_bytes: int, num_rows: int) -> None:
        """Copies num_rows rows, pitch_bytes apart, from one offset to another within the range; they are there when this returns."""
        self._device.make_current()
        sides = {
            f"{side}_{name}": value
            for side, offset in (("src", source), ("dst", target))
            for name, value in (("type", _ON_DEVICE), ("device", self.address + offset), ("pitch", pitch_bytes))
        }
        copy = _Copy2D(**sides, width_bytes=row_bytes, height=num_rows)
        self._device.call("cuMemcpy2DAsync_v2", ctypes.byref(copy), self._device.copy_stream)
        self._device.call("cuStreamSynchronize", self._device.copy_stream)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of some bytes on the host. From any thread."""
        self._device.make_current()
        buffer = ctypes.create_string_buffer(num_bytes)
        self._device.call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(self.address + offset), ctypes.c_size_t(num_bytes))
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        """Puts bytes of the host there. From any thread."""
        self._device.make_current()
        self._device.call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.address + offset), data, ctypes.c_size_t(len(data)))

    def close(self) -> None:
        """Unmaps it and closes the descriptor; others keep theirs."""
        size = ctypes.c_size_t(self.num_bytes)
        self._device.make_current()
        self._device.call("cuMemUnmap", ctypes.c_uint64(self.address), size)
        self._device.call("cuMemAddressFree", ctypes.c_uint64(self.address), size)
        os.close(self.fd)
