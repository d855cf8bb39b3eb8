"""Where the checkpoint lies that a user names."""

from __future__ import annotations

from pathlib import Path

from clients.errors import ClientError

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "services" / "decoder" / "demo_model" / "checkpoint"


class NoModelError(ClientError):
    """The name leads to no checkpoint."""


def find_model(name: str) -> Path:
    """The folder of a checkpoint: of the bundled one for `demo`, else the folder itself; raises NoModelError."""
    folder = _DEMO_FOLDER if name == DEMO else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if name == DEMO:
        raise NoModelError(f"--model: the bundled model is missing from this installation ({folder})")
    kind = "has no config.json" if folder.is_dir() else "is no folder"
    raise NoModelError(f"--model: {name} {kind}; give the folder of a checkpoint, or `demo` for the bundled model")
