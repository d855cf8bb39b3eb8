"""Kernel tests need the kernels, which tests/conftest.py has built: a machine without a compiler skips them, and says why."""

from __future__ import annotations

import platform

import pytest

from services.decoder.ops.native import NativeOps, why_unavailable


def _runnable_isas() -> list[str]:
    """The sets of kernels that this processor can run."""
    if why_unavailable():
        return [""]
    names = {"x86_64": ["avx2", "avx512_vnni"], "aarch64": ["neon_dotprod"]}.get(platform.machine(), [])
    runnable = []
    for name in ["plain", *names]:
        try:
            NativeOps(isa=name, threads=1)
        except OSError:
            continue
        runnable.append(name)
    return runnable


ISAS = _runnable_isas()


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each set of kernels that this processor can run."""
    name: str = request.param
    return name
