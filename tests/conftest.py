"""What every test starts from."""

from __future__ import annotations

import pytest
import structlog
from hypothesis import settings

from tests.native_kernels import build_if_stale

# A busy machine stops a process for longer than any deadline of an example; pytest-timeout ends what hangs.
settings.register_profile("leasehold", deadline=None)
settings.load_profile("leasehold")

# Who changed a kernel tests the change. Here, before the kernels are first loaded, and before xdist starts its processes.
build_if_stale()


@pytest.fixture(autouse=True)
def logs_as_structlog_configures_them() -> None:
    """A test before this one may have configured a level, and lines below it could not be captured."""
    structlog.reset_defaults()
