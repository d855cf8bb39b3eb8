"""The decoder's command line, checked loudly: every error names the flag and the fix."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import platform
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from services.decoder.cuda_start import why_no_mlx_for_cuda
from services.decoder.errors import ConfigError
from services.logs import LOG_LEVELS
from services.metrics import check_metrics_address
from services.serving import AddressError, check_address

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_KV_MANAGER = "127.0.0.1:50050"
DEFAULT_MAX_SEQS = 32  # twice a burst of 16
DEFAULT_MAX_WAITING = 1024  # 32 batches: who would wait longer is better told at once
DEFAULT_KV_CAPACITY = 2048  # tokens; the model's maximum when that is smaller
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
BACKENDS = ("mlx", "native", "cuda")
PRECISIONS = ("exact", "fast")
KV_DTYPES = ("auto", "bf16", "f16", "f32", "int8")
KV_LAYOUTS = ("hnd", "nhd")
NATIVE_MODULE = "services.decoder.ops.native"

_WORKER_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_MAX_INT = 2**31 - 1

_EPILOG = """\
examples:
  python -m services.decoder --model ~/models/Qwen3-30B-A3B-4bit
      serves on 127.0.0.1:50051 with K/V blocks leased from the manager on 127.0.0.1:50050
  python -m services.decoder --model DIR --kv-capacity 8192 --max-seqs 16
      longer requests, fewer of them at a time
  python -m services.decoder --model DIR --no-paged
      needs no manager; a request owns one contiguous cache
"""


@dataclass(frozen=True)
class DecoderConfig:
    """The command line as given; what depends on the checkpoint is still None."""

    model: Path
    listen: str
    kv_manager: str
    backend: str  # of BACKENDS, or "auto"
    precision: str | None  # "exact" or "fast"; None: resolve_precision decides
    max_seqs: int
    max_waiting: int
    kv_capacity: int | None  # tokens; None: resolve_kv_capacity decides
    max_num_batched_tokens: int
    kv_dtype: str  # of KV_DTYPES; "auto": resolve_kv_dtype decides
    kv_layout: str  # of KV_LAYOUTS
    paged: bool
    reserve_full: bool
    shares_prefixes_between_tenants: bool
    worker_id: str
    log_level: str
    threads: int | None  # None: the backend decides
    grace_s: float  # how long a running request may go on after SIGTERM
    metrics_listen: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse_args(argv: Sequence[str]) -> DecoderConfig:
    """The command line as a checked config; raises ConfigError naming the flag and the fix."""
    args = _parser().parse_args(argv)
    listen = _address("--listen", args.listen)
    kv_manager = _address("--kv-manager", args.kv_manager)
    metrics_listen = _metrics_address(args.metrics_listen)
    if args.paged and kv_manager.endswith(":0"):
        raise ConfigError(f"--kv-manager: {kv_manager!r} has port 0; write the port that the manager listens on")
    if args.max_num_batched_tokens < args.max_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens: {args.max_num_batched_tokens} is less than --max-seqs {args.max_seqs}, and every "
            f"running sequence needs one token a step; raise it to {args.max_seqs} or more, or lower --max-seqs"
        )
    if args.backend == "cuda" and not args.paged:
        raise ConfigError("--no-paged: the cuda backend works on a manager's pool in GPU memory; leave the flag out")
    return DecoderConfig(
        model=_model_dir(args.model),
        listen=listen,
        kv_manager=kv_manager,
        backend=args.backend,
        precision=args.precision,
        max_seqs=args.max_seqs,
        max_waiting=args.max_waiting,
        kv_capacity=args.kv_capacity,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_dtype=args.kv_dtype,
        kv_layout=args.kv_layout,
        paged=args.paged,
        reserve_full=args.reserve == "full",
        shares_prefixes_between_tenants=args.share_prefixes_between_tenants,
        worker_id=_worker_id(args.worker_id, listen),
        log_level=args.log_level,
        threads=args.threads,
        grace_s=args.grace,
        metrics_listen=metrics_listen,
    )


def resolve_kv_capacity(requested: int | None, model_max_tokens: int) -> int:
    """The tokens that one request may hold; raises ConfigError when more are asked for than the model can do."""
    if requested is None:
        return min(model_max_tokens, DEFAULT_KV_CAPACITY)
    if requested > model_max_tokens:
        raise ConfigError(
            f"--kv-capacity: {requested} tokens are more than this model's maximum of {model_max_tokens} "
            f"(max_position_embeddings in config.json); use {model_max_tokens} or less"
        )
    return requested


def resolve_backend(requested: str) -> str:
    """The backend to use; `auto` takes native where it is built, on a Linux CPU. Raises ConfigError when it is absent."""
    if requested == "mlx":
        return "mlx"
    if requested == "cuda":
        problem = why_no_mlx_for_cuda()
        if problem:
            raise ConfigError(f"--backend: cuda is not available: {problem}")
        return "cuda"
    reason = _why_no_native()
    if requested == "auto":
        return "mlx" if reason else "native"
    if reason:
        raise ConfigError(f"--backend: native is not available: {reason}; build it, or use --backend mlx or auto")
    return "native"


def resolve_precision(requested: str | None, backend: str, checkpoint_dtype: str) -> str:
    """How quantised weights are multiplied; raises ConfigError when the backend cannot do what is asked for.

    Kernels of our own are fast unless the checkpoint itself is float32, scales included: who stores that wants it computed.
    """
    if backend == "mlx":
        if requested == "fast":
            raise ConfigError(
                "--precision: fast needs --backend native or cuda; the mlx backend always computes exactly"
            )
        return "exact"
    return requested or ("exact" if checkpoint_dtype == "f32" else "fast")


def resolve_kv_dtype(requested: str, checkpoint_dtype: str, backend: str = "", precision: str = "") -> str:
    """The precision of K/V; `auto` takes the checkpoint's, or what the fast cuda kernels compute in."""
    if requested == "auto" and (backend, precision) == ("cuda", "fast"):
        return "bf16"
    return checkpoint_dtype if requested == "auto" else requested


def check_kv(kv_dtype: str, kv_layout: str, backend: str, precision: str) -> None:
    """Raises ConfigError for K/V that the backend's kernels do not read, before anything is loaded."""
    if backend == "cuda" and kv_dtype == "int8":
        raise ConfigError("--kv-dtype: the cuda backend has no int8 K/V; use bf16, or --backend mlx or native")
    if (backend, precision, kv_layout) == ("cuda", "fast", "nhd"):
        raise ConfigError("--kv-layout: the fast cuda kernels take hnd only; use hnd, or --precision exact")


def _why_no_native() -> str:
    """Empty when the native backend can be used."""
    if platform.system() != "Linux":
        return f"it is for Linux CPUs, and this is {platform.system()}"
    spec = importlib.util.find_spec(NATIVE_MODULE)
    if spec is None or spec.origin is None:  # a folder without __init__.py has a spec, but no origin
        return "it is not part of this installation"
    try:
        module = importlib.import_module(NATIVE_MODULE)
    except (ImportError, OSError) as error:
        return f"it does not load ({error})"
    why: str = getattr(module, "why_unavailable", lambda: "")()
    return why


def _address(flag: str, address: str) -> str:
    try:
        return check_address(flag, address)
    except AddressError as error:
        raise ConfigError(str(error)) from error


def _metrics_address(address: str | None) -> str | None:
    try:
        return None if address is None else check_metrics_address(address)
    except AddressError as error:
        raise ConfigError(str(error)) from error


def _model_dir(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.exists():
        raise ConfigError(
            f"--model: {text} does not exist; give the folder of a checkpoint (config.json and *.safetensors)"
        )
    if not path.is_dir():
        raise ConfigError(f"--model: {text} is a file; give the folder that holds config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"--model: {text} has no config.json; give the folder of a checkpoint in Hugging Face's layout"
        )
    return path.resolve()


def _worker_id(given: str | None, listen: str) -> str:
    if given is not None:
        if _WORKER_ID.match(given) is None:
            raise ConfigError(f"--worker-id: {given!r} is not 1 to 64 characters of [A-Za-z0-9._-]")
        return given
    # Port 0 is another port each time, and two such decoders of one host must not share an id.
    address = f"auto-{secrets.token_hex(4)}" if listen.endswith(":0") else listen.replace(":", "-")
    worker_id = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{socket.gethostname()}-{address}")
    if len(worker_id) <= 64:
        return worker_id
    digest = hashlib.blake2b(worker_id.encode(), digest_size=4).hexdigest()
    return f"{worker_id[:55]}-{digest}"


def _whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number; give a whole number of at least {least}"
            ) from None
        if not least <= value <= _MAX_INT:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a whole number from {least} to {_MAX_INT}")
        return value

    return parse


_positive_int = _whole_number(1)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give seconds, 0 or more") from None
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 0 to 86400 seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m services.decoder",
        description="Serves a Mixture-of-Experts model over gRPC, with K/V blocks leased from a KV manager.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        required=True,
        help="folder of a checkpoint: config.json, *.safetensors, tokenizer.json",
    )
    add(
        "--listen",
        metavar="ADDR",
        default=DEFAULT_LISTEN,
        help="HOST:PORT or unix:PATH; port 0 takes a free one (%(default)s)",
    )
    add("--kv-manager", metavar="ADDR", default=DEFAULT_KV_MANAGER, help="where the KV manager listens (%(default)s)")
    add(
        "--backend",
        choices=(*BACKENDS, "auto"),
        default="auto",
        help="what computes: mlx everywhere, native on Linux CPUs, cuda on an NVIDIA GPU with a manager that has --pool-memory "
        "cuda; auto takes native where it is built (%(default)s)",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="exact computes in float32; fast is several times faster: with 4- and 8-bit weights native rounds activations to 8 "
        "bits a group, and cuda computes in bf16 (fast, or exact for a float32 checkpoint; mlx: always exact)",
    )
    _add_batch(parser)
    _add_leases(parser)
    _add_process(parser)
    return parser


def _add_batch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-seqs",
        metavar="N",
        type=_positive_int,
        default=DEFAULT_MAX_SEQS,
        help="requests in a batch (%(default)s)",
    )
    add(
        "--max-waiting",
        metavar="N",
        type=_whole_number(0),
        default=DEFAULT_MAX_WAITING,
        help="requests that wait beyond the batch, each of a request's n samples counted; a new one beyond that is refused at once "
        "with RESOURCE_EXHAUSTED, one that another decoder had started is not (%(default)s)",
    )
    add(
        "--kv-capacity",
        metavar="TOKENS",
        type=_positive_int,
        help=f"prompt plus output of one request, at most the model's maximum (the smaller of that and {DEFAULT_KV_CAPACITY})",
    )
    add(
        "--max-num-batched-tokens",
        metavar="N",
        type=_positive_int,
        default=DEFAULT_MAX_NUM_BATCHED_TOKENS,
        help="tokens in a step; longer prompts are computed in chunks (%(default)s)",
    )


def _add_leases(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="precision of K/V: auto is the checkpoint's, int8 has a scale for each token and head and takes about half of "
        "bf16's memory (%(default)s)",
    )
    add(
        "--kv-layout",
        choices=KV_LAYOUTS,
        default="hnd",
        help="order within a block: heads, tokens (hnd) or tokens, heads (nhd); it changes no token (%(default)s)",
    )
    add(
        "--paged",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="lease K/V blocks from the manager; --no-paged keeps one contiguous cache a request and needs no manager",
    )
    add(
        "--reserve",
        choices=("grow", "full"),
        default="grow",
        help="lease blocks as a request grows, or all of --kv-capacity at once (%(default)s)",
    )
    add(
        "--share-prefixes-between-tenants",
        action="store_true",
        help="let a tenant's prompts hit cached blocks of another's. A tenant is what a request's leasehold-tenant metadata "
        "names; without this flag each finds only its own blocks. With it a common prefix is computed once for all, and a "
        "tenant can tell by num_cached_tokens, or by the time to its first token, that another has sent a prefix before",
    )
    add("--worker-id", metavar="NAME", help="this decoder's name at the manager (host name and listen address)")


def _add_process(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", metavar="N", type=_positive_int, help="threads that compute, where the backend lets one choose")
    add(
        "--grace",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="how long running requests may go on after SIGTERM before they are cancelled (%(default)s)",
    )
    add("--metrics-listen", metavar="HOST:PORT", help="serve Prometheus metrics at http://HOST:PORT/metrics (off)")
    add("--log-level", choices=tuple(LOG_LEVELS), default="info", help="least severe log line to write (%(default)s)")
