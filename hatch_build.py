"""Hatchling's build hook: compiles the native backend's kernels into the wheel, with the system's compiler, if there is one.

Without a compiler the install succeeds all the same; the decoder then says what it lost (services/decoder/ops/native/lib.py).
An editable install compiles in place.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUILD_SCRIPT = "services/decoder/ops/native/build.py"


class CustomBuildHook(BuildHookInterface[Any]):
    """Runs before a wheel is packed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and tells hatchling that the wheel belongs to this platform."""
        if self.target_name != "wheel" or platform.system() != "Linux":
            return
        script = _load(Path(self.root) / _BUILD_SCRIPT)
        try:
            library = script.build()
        except script.BuildError as error:
            self.app.display_warning(f"the native kernels are not compiled; --backend mlx will do without: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["pure_python"] = False


def _platform_tag() -> str:
    # The library needs glibc and nothing else, but its floor is what this machine links against.
    return f"linux_{platform.machine()}"


def _load(path: Path) -> ModuleType:
    """A module by its path: importing the package would need what is not installed yet."""
    spec = importlib.util.spec_from_file_location("leasehold_native_build", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
