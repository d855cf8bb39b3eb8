"""The CUDA driver through ctypes: one device, and memory on it that several processes map.

Nothing but the driver's own library is needed, so the KV manager's image stays small. Importing this touches no GPU.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
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


class CudaDevice:
    """The primary context of one device, which MLX uses too; current on the thread that made this object."""

    def __init__(self, index: int = 0) -> None:
        """Raises CudaError where there is no driver or no such device."""
        self.index = index
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the CUDA driver cannot be loaded: {error}") from error
        self.call("cuInit", 0)
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
