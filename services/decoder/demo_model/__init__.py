"""A small Qwen3-MoE checkpoint that answers the questions of `clients.probes`."""

from pathlib import Path


def checkpoint_dir() -> Path:
    """The directory of the committed checkpoint, in Hugging Face layout."""
    return Path(__file__).parent / "checkpoint"
