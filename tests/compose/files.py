"""compose.yaml and its neighbours, read as their own tools read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "services" / "monitoring"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}")


def with_defaults(value: Any) -> Any:
    """The value with every ${NAME:-default} resolved to its default, as Compose does when NAME is not set."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: match["default"], value)
    if isinstance(value, list):
        return [with_defaults(item) for item in value]
    if isinstance(value, dict):
        return {key: with_defaults(item) for key, item in value.items()}
    return value


def compose() -> dict[str, Any]:
    """compose.yaml, its anchors merged and its defaults in place."""
    loaded: dict[str, Any] = with_defaults(yaml.safe_load((ROOT / "compose.yaml").read_text()))
    return loaded


def read_yaml(path: Path) -> Any:
    """A YAML file."""
    return yaml.safe_load(path.read_text())
