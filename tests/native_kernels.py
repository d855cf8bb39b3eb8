"""The native backend's kernels as the tests need them: compiled from the sources that lie here."""

from __future__ import annotations

import platform
import sys

from services.decoder.ops.native import build, why_unavailable
from services.decoder.ops.native.lib import kernels


def build_if_stale() -> str:
    """Why the kernels cannot be tested here, or nothing: where they are absent or older than their sources, they are built in place.

    Raises BuildError for sources that do not compile, and OSError for what they were compiled to and does not load: neither is a
    reason to skip a test. A machine without a compiler has one.
    """
    if platform.system() != "Linux":
        return why_unavailable()
    if not _is_current():
        try:
            build.find_compiler()
        except build.BuildError as error:
            return f"{build.LIBRARY} is absent or older than its sources, and {error}"
        print(f"building {build.LIBRARY}, which is absent or older than its sources", file=sys.stderr, flush=True)
        build.build(build.LIBRARY)
    kernels()
    return ""


def _is_current() -> bool:
    # Told from the bytes, because a process that has once loaded a library gets the same one again by that name.
    return build.LIBRARY.exists() and build.source_hash().encode() in build.LIBRARY.read_bytes()
