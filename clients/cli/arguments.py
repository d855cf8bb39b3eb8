"""What the command line may say."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from clients.cli import values
from clients.decoder import DEFAULT_RETRY_FOR_S
from clients.loadtest.arguments import ACTIONS, EXAMPLES, add_loadtest
from clients.stack import DEFAULT_DECODER_PORT, DEFAULT_MANAGER_PORT

DEFAULT_DECODER = f"127.0.0.1:{DEFAULT_DECODER_PORT}"
DEFAULT_KV_MANAGER = f"127.0.0.1:{DEFAULT_MANAGER_PORT}"

_EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C"

_EXAMPLES = f"""\
a first session:
  leasehold up --model demo                        start a manager and a decoder, with the bundled model
  leasehold chat                                   talk to it, in another terminal
  leasehold generate --prompt 'Repeat: zebra-4821'
  leasehold status                                 who holds which blocks
  leasehold loadtest --users 16                    put it under load; every answer is checked

`leasehold COMMAND --help` says more, with examples.
{_EXIT_CODES}
"""

_UP_EXAMPLES = f"""\
examples:
  leasehold up --model demo                        the small model that comes with leasehold
  leasehold up --model ~/models/Qwen3-30B-A3B-4bit --num-blocks 4096 --pool-dir /dev/shm/leasehold
  leasehold up --model demo --decoders 2           two decoders that share one pool

The logs of all services come to stderr. The addresses are printed when all are healthy. Ctrl-C or SIGTERM stops all;
when one service ends by itself, the others are stopped and the exit code is 1.
{_EXIT_CODES}
"""

_GENERATE_EXAMPLES = f"""\
examples:
  leasehold generate --prompt 'Repeat: zebra-4821'
  leasehold generate --prompt 'Once upon a time' --raw --temperature 0.8 --top-p 0.95 --max-tokens 50
  leasehold generate --token-ids 1,2,3 --json
  leasehold generate --prompt 'Once upon a time' --raw --temperature 0.8 --seed 7 --n 4
  leasehold generate --decoder 127.0.0.1:50051 --decoder 127.0.0.1:50052 --prompt Hi
                                                   a decoder that dies is replaced by the other, token-exact

--json prints exactly one object when the request has ended, also when it failed, was cancelled or met its deadline:
token_ids, text, finish_reason (stop, length, cancelled, deadline or error), num_prompt_tokens, num_cached_tokens,
seed, ttft_s, e2e_s; and `error` when it failed, `logprobs` when asked for, `num_resumptions` and `exact_resume` when
the stream went on after a break. With --n above 1 these are sample 0's, and `samples` lists all: sample_index, token_ids,
text and finish_reason of each. Sample 0 is what --n 1 gives for the same seed.
{_EXIT_CODES}
"""

_CHAT_EXAMPLES = f"""\
examples:
  leasehold chat
  leasehold chat --temperature 0.7 --system 'Answer in one word.'
  printf 'Repeat: oak-1234\\nWhat is 17 + 25?\\n' | leasehold chat

In the conversation: /help, /reset, /quit. Ctrl-C cancels an answer; twice, or Ctrl-D, leaves.
{_EXIT_CODES}
"""

_STATUS_EXAMPLES = f"""\
examples:
  leasehold status
  leasehold status --kv-manager 127.0.0.1:50050 --json | jq .free
{_EXIT_CODES}
"""

_FLUSH_EXAMPLES = f"""\
examples:
  leasehold flush                                  forget every cached prefix
  leasehold flush --tenant acme

Blocks that a request holds stay.
{_EXIT_CODES}
"""

_SCRUB_EXAMPLES = """\
examples:
  leasehold scrub
  leasehold scrub --rate 200MiB --json             gently: at most 200 MiB a second

Reads every sealed block and compares it with its checksum. A damaged block is never found by a prefix again.
exit codes: 0 nothing damaged, 1 something damaged or failed, 2 wrong usage, 130 Ctrl-C
"""

_TOP_EXAMPLES = f"""\
examples:
  leasehold top
  leasehold top --kv-manager 127.0.0.1:50050 --metrics 127.0.0.1:9101 --interval 0.5
  leasehold top --once                             one picture, for a pipe or a file

Ctrl-C leaves.
{_EXIT_CODES}
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; `args.command` names the subcommand."""
    parser = argparse.ArgumentParser(
        prog="leasehold",
        description="Paged KV-cache blocks that decoders lease, and that outlive them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(_command(commands, "up", "start a manager and decoders on this host", _UP_EXAMPLES))
    _add_generate(_command(commands, "generate", "generate text for one prompt", _GENERATE_EXAMPLES))
    _add_chat(_command(commands, "chat", "talk with the model, turn by turn", _CHAT_EXAMPLES))
    _add_status(_command(commands, "status", "show the pool, its leases and its sessions", _STATUS_EXAMPLES))
    _add_top(_command(commands, "top", "watch the pool and its holders live", _TOP_EXAMPLES))
    _add_flush(_command(commands, "flush", "forget cached prefixes", _FLUSH_EXAMPLES))
    _add_scrub(_command(commands, "scrub", "verify every sealed block", _SCRUB_EXAMPLES))
    add_loadtest(_command(commands, "loadtest", "put a system under load and measure it", EXAMPLES), add_stack_flags)
    return parser


def normalize(argv: Sequence[str]) -> list[str]:
    """The command line with what may be left out: `loadtest` alone means `loadtest run`."""
    if argv[:1] == ["loadtest"] and (len(argv) == 1 or argv[1] not in (*ACTIONS, "-h", "--help")):
        return ["loadtest", "run", *argv[1:]]
    return list(argv)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_stack_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what `up` starts."""
    add = parser.add_argument
    add("--pool-dir", metavar="DIR", help="where the pool files lie (a temporary folder, removed at the end)")
    add("--num-blocks", type=values.whole(1, 2**31), metavar="N", help="blocks in the pool (what the decoder needs)")
    add("--pool-bytes", metavar="SIZE", help="size of the pool instead, such as 2GiB")
    add("--block-size", type=values.whole(1, 256), metavar="TOKENS", help="tokens in a block (16)")
    add("--decoders", type=values.whole(1, 64), default=1, metavar="N", help="how many decoders to start (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add(
        "--manager-port",
        type=values.whole(0, 65535),
        default=DEFAULT_MANAGER_PORT,
        metavar="PORT",
        help="port of the manager, 0 for a free one (%(default)s)",
    )
    add(
        "--decoder-port",
        type=values.whole(0, 65535),
        default=DEFAULT_DECODER_PORT,
        metavar="PORT",
        help="port of the first decoder, the next ones follow; 0 for free ones (%(default)s)",
    )
    add("--backend", metavar="NAME", help="what the decoder computes with: mlx, native, cuda or auto (auto)")
    add(
        "--pool-memory",
        choices=("host", "cuda"),
        help="where the pool is: host memory, or an NVIDIA GPU's, which --backend cuda needs (what the backend needs)",
    )
    add("--max-seqs", type=values.whole(1, 2**31 - 1), metavar="N", help="requests in a decoder's batch (32)")
    add(
        "--kv-capacity",
        type=values.whole(1, 2**31 - 1),
        metavar="TOKENS",
        help="prompt plus output of one request (the model's maximum, or 2048 if that is smaller)",
    )
    add("--max-num-batched-tokens", type=values.whole(1, 2**31 - 1), metavar="N", help="tokens in a step (2048)")
    add(
        "--kv-dtype",
        choices=("auto", "bf16", "f16", "f32", "int8"),
        help="precision of K/V; auto is the checkpoint's, int8 takes about half of bf16's memory (auto)",
    )
    add("--kv-layout", choices=("hnd", "nhd"), help="order of heads and tokens within a block (hnd)")
    add("--reserve", choices=("grow", "full"), help="lease blocks as a request grows, or all at once (grow)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(%(default)s)")


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of a checkpoint, or `demo` for the bundled model"
    )
    add_stack_flags(parser)


def _add_target_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoder",
        type=values.target,
        action="append",
        metavar="HOST:PORT",
        help=f"a decoder to use; several take over from one another ({DEFAULT_DECODER})",
    )
    parser.add_argument(
        "--retry-for",
        type=values.seconds,
        default=DEFAULT_RETRY_FOR_S,
        metavar="S",
        help="seconds to go on trying while no decoder is available, counted anew after each token; a full pool or queue is told at "
        "once (%(default)g)",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-tokens", type=values.whole(1, 2**31 - 1), metavar="N", help="most tokens to generate (what fits)")
    add("--temperature", type=values.number(0, math.inf), default=0.0, metavar="T", help="0 is greedy (%(default)g)")
    add("--top-k", type=values.whole(0, 2**31 - 1), default=0, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=values.number(0, 1, above=True), metavar="P", help="keep the likeliest up to this share (1)")
    add("--min-p", type=values.number(0, 1), metavar="P", help="drop tokens below this share of the likeliest (0)")
    add("--seed", type=values.whole(0, values.MAX_SEED), metavar="N", help="fixes the random choices (drawn)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_target_flags(parser)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="goes through the model's chat template where there is one")
    prompt.add_argument("--token-ids", type=values.token_ids, metavar="1,2,3", help="a prompt as token ids")
    add("--raw", action="store_true", help="take --prompt as it is, without the chat template")
    _add_sampling_flags(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    add("--ignore-eos", action="store_true", help="do not stop at the model's own stop tokens")
    add(
        "--logprobs",
        type=values.whole(0, 20),
        nargs="?",
        const=0,
        metavar="N",
        help="report log-probabilities, with N alternatives each (0)",
    )
    add(
        "--n",
        type=values.whole(1, 1024),
        default=1,
        metavar="N",
        help="samples of the prompt, which is computed once; printed one after another at the end (%(default)s)",
    )
    add("--timeout", type=values.number(0, 1e9, above=True), metavar="S", help="deadline of the whole request")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_target_flags(parser)
    _add_sampling_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first turn")


def _add_top(parser: argparse.ArgumentParser) -> None:
    _add_manager_flag(parser)
    parser.add_argument(
        "--metrics",
        type=values.target,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a decoder's Prometheus endpoint, for tokens/s, queue and step time; repeatable",
    )
    parser.add_argument(
        "--interval", type=values.number(0.1, 3600), default=1.0, metavar="S", help="seconds between pictures (1)"
    )
    parser.add_argument("--once", action="store_true", help="print one picture and leave")


def _add_flush(parser: argparse.ArgumentParser) -> None:
    _add_status(parser)
    parser.add_argument("--tenant", metavar="NAME", help="only this tenant's blocks (all)")


def _add_scrub(parser: argparse.ArgumentParser) -> None:
    _add_status(parser)
    parser.add_argument(
        "--rate",
        type=values.size,
        default=0,
        metavar="SIZE",
        help="most bytes a second, such as 200MiB (the manager's)",
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_manager_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_manager_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-manager",
        type=values.target,
        default=DEFAULT_KV_MANAGER,
        metavar="HOST:PORT",
        help="the manager to ask (%(default)s)",
    )
