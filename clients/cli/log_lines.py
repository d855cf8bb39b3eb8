"""The services' JSON log lines, made readable."""

from __future__ import annotations

import json


def readable(name: str, line: str) -> str:
    """One line for people: who, when, how bad, what, and the rest as key=value; other output stays as it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "event" not in entry:
        return f"{name:10s} | {line}"
    event, level = entry.pop("event"), entry.pop("level", "info")
    time = str(entry.pop("timestamp", ""))[11:19]
    exception = entry.pop("exception", None)
    rest = " ".join(f"{key}={_short(value)}" for key, value in entry.items())
    text = f"{name:10s} | {time} {level:7s} {event} {rest}".rstrip()
    if exception:
        text += "".join(f"\n{name:10s} |   {part}" for part in str(exception).splitlines())
    return text


def _short(value: object) -> str:
    if isinstance(value, str):
        return value if value and " " not in value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)
