"""What the command says on stderr: one clear line for each error, with the code, the field and the fix."""

from __future__ import annotations

import re
import sys

import grpc

from clients.errors import CallError, ClientError, DecoderUnavailable, ErrorDetails
from clients.events import StreamBroken, StreamResumed

# gRPC chains its causes, the system's own word last: "...: Failed to connect to remote host: Connection refused".
_NO_CONNECTION = re.compile(
    r"^(?:failed to connect|errors resolving|DNS resolution failed).*: (?P<why>[^:\]]+)", re.DOTALL
)

_FIXES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "try again later",
    grpc.StatusCode.DEADLINE_EXCEEDED: "give it longer with --timeout, or ask for fewer tokens with --max-tokens",
}


def say(line: str) -> None:
    """Writes one line to stderr."""
    print(f"leasehold: {line}", file=sys.stderr, flush=True)


def describe(error: ClientError, service: str = "decoder", flag: str = "--decoder") -> str:
    """An error in one line, with its code, the field that is wrong, and what to do; `flag` names another `service`."""
    if isinstance(error, CallError):
        line = _describe_call(error.details, service, flag)
        if isinstance(error, DecoderUnavailable) and error.num_attempts > 1:
            line += f" ({error.num_attempts} attempts in {error.outage_s:.1f} s; --retry-for sets how long)"
        return line
    return str(error)


def describe_break(event: StreamBroken, retry_for_s: float) -> str:
    """Why the client waits, and for how long it will."""
    return f"{_why(event.error.details)}; trying for up to {retry_for_s:g} s"


def describe_resumption(event: StreamResumed) -> str:
    """Where the stream goes on, and a warning when it may go on differently."""
    line = f"going on at {event.target} after {event.num_output_tokens} tokens"
    if event.exact:
        return line
    return (
        f"warning: {line}, but that decoder computes differently (another numerics id): "
        "from here on the text may not be what the first one would have written"
    )


def error_object(error: ClientError) -> dict[str, object]:
    """An error as `--json` prints it."""
    if isinstance(error, CallError):
        details = error.details
        return {
            "code": details.code.name,
            "reason": details.reason,
            "field": details.field,
            "message": details.message,
            "target": details.target,
            "metadata": dict(details.metadata),
            "retry_delay_s": details.retry_delay_s,
        }
    return {"code": "CLIENT", "reason": type(error).__name__, "field": "", "message": str(error)}


def _describe_call(details: ErrorDetails, service: str, flag: str) -> str:
    if details.code is grpc.StatusCode.UNAVAILABLE and not details.reason:
        return (
            f"UNAVAILABLE: {_why(details)}; is a {service} running there? "
            f"`leasehold up --model DIR` starts one, {flag} HOST:PORT names another"
        )
    parts = [details.code.name]
    if details.reason:
        parts.append(f"[{details.reason}]")
    if details.field and not details.message.startswith(details.field):
        parts.append(f"{details.field}:")
    line = " ".join(parts) + f": {details.message}"
    if details.metadata:
        line += " (" + ", ".join(f"{key}={value}" for key, value in sorted(details.metadata.items())) + ")"
    fix = _FIXES.get(details.code)
    if fix is not None:
        wait = "" if details.retry_delay_s is None else f" (it asks for {details.retry_delay_s:g} s)"
        line += f"; {fix}{wait}"
    return line


def _why(details: ErrorDetails) -> str:
    """Why a target did not serve, without gRPC's chain of causes where the last one tells all."""
    if details.reason:
        return f"{details.target}: {details.message}"
    match = _NO_CONNECTION.match(details.message)
    if match is not None:
        return f"cannot reach {details.target} ({match['why'].strip()})"
    return f"lost {details.target} ({details.message})"
