"""`leasehold chat`: a conversation, turn by turn, in a terminal or from a pipe."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing, suppress

from clients.cli.generate import RetryNotes
from clients.cli.messages import describe, say
from clients.cli.requests import chat, sampling_params
from clients.cli.terminal import printable
from clients.decoder import DecoderClient
from clients.errors import CallError, ClientError
from clients.events import Finished, FinishReason, StreamBroken, StreamResumed, Tokens
from clients.progress import draw_seed
from protos import decoder_pb2 as pb

_HELP = """\
/reset   forget the conversation
/quit    leave; so does Ctrl-D, or Ctrl-C twice
/help    this
Anything else is said to the model. Ctrl-C cancels an answer."""

_EXIT_INTERRUPTED = 130


class Conversation:
    """The turns so far, and the one that is being answered."""

    def __init__(self, client: DecoderClient, args: argparse.Namespace, write: Callable[[str], None]) -> None:
        self._client = client
        self._args = args
        self._write = write
        self._messages: list[tuple[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system message."""
        self._messages = [("system", self._args.system)] if self._args.system else []

    @property
    def num_turns(self) -> int:
        """Turns that were answered, in whole or in part."""
        return sum(role == "assistant" for role, _ in self._messages)

    async def answer(self, question: str) -> None:
        """Streams the answer; a turn that got no text at all is forgotten, one that was cut short is kept."""
        self._messages.append(("user", question))
        text: list[str] = []
        try:
            await self._stream(text)
        finally:
            if text:
                self._messages.append(("assistant", "".join(text)))
            else:
                self._messages.pop()

    async def _stream(self, text: list[str]) -> None:
        args = self._args
        request = pb.GenerateRequest(
            chat=chat(self._messages),
            sampling=sampling_params(args, args.seed if args.seed is not None else draw_seed()),
            stop=pb.StopConditions(max_tokens=args.max_tokens),
        )
        notes = RetryNotes(args.retry_for)
        async with aclosing(self._client.generate(request, retry_for_s=args.retry_for)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    if event.text:
                        text.append(event.text)
                        self._write(printable(event.text))
                elif isinstance(event, StreamBroken):
                    notes.broken(event)
                elif isinstance(event, StreamResumed):
                    notes.resumed(event)
                elif isinstance(event, Finished) and event.reason is FinishReason.CANCELLED:
                    say("the answer was cancelled at the decoder")


class Repl:
    """Reads turns until the end of input; a runner of its own, because reading blocks and answering does not."""

    def __init__(self, runner: asyncio.Runner, conversation: Conversation) -> None:
        self._runner = runner
        self._conversation = conversation
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._failed = False

    def run(self) -> int:
        """The exit code, once the input has ended or the user has left."""
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  # editing and history for input()
            print("/help lists the commands; Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                line = input("> " if self._interactive else "").strip()
                interrupted = False
                if line == "/quit":
                    break
                self._turn(line)
            except EOFError:
                if self._interactive:
                    print()
                break
            except KeyboardInterrupt:
                if interrupted or not self._interactive:
                    return _EXIT_INTERRUPTED
                interrupted = True
                print("\n(Ctrl-C again or Ctrl-D leaves)")
        return 1 if self._failed and not self._interactive else 0

    def _turn(self, line: str) -> None:
        if not line:
            return
        if line == "/help":
            print(_HELP)
        elif line == "/reset":
            self._conversation.reset()
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command; /help lists them")
        else:
            try:
                if self._runner.run(self._is_interrupted(line)):
                    raise KeyboardInterrupt
            except ClientError as error:
                self._failed = True
                say(describe(error) + self._hint(error))
            else:
                print(flush=True)

    async def _is_interrupted(self, line: str) -> bool:
        """Streams the answer; whether Ctrl-C has cancelled it."""
        loop, answering = asyncio.get_running_loop(), asyncio.ensure_future(self._conversation.answer(line))
        # The runner's own handler does not wake a loop that was just about to wait: until the next token came, Ctrl-C did nothing.
        loop.add_signal_handler(signal.SIGINT, answering.cancel)
        try:
            await asyncio.wait({answering})
        except asyncio.CancelledError:  # by the runner's, in the moment before
            answering.cancel()
            await asyncio.wait({answering})
            raise
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        if answering.cancelled():
            return True
        answering.result()
        return False

    def _hint(self, error: ClientError) -> str:
        too_long = isinstance(error, CallError) and error.code.name == "OUT_OF_RANGE"
        return "; /reset starts a shorter conversation" if too_long and self._conversation.num_turns else ""


def run(args: argparse.Namespace, default_decoder: str) -> int:
    """Holds the conversation and returns the exit code."""
    with asyncio.Runner() as runner:
        client = runner.run(_connect(args, default_decoder))
        try:
            info = runner.run(client.model_info(retry_for_s=args.retry_for))
            if not info.has_chat_template:
                say(f"{info.name} has no chat template; use `leasehold generate --prompt TEXT --raw`")
                return 1
            return Repl(runner, Conversation(client, args, _write)).run()
        except ClientError as error:
            say(describe(error))
            return 1
        finally:
            runner.run(client.close())


async def _connect(args: argparse.Namespace, default_decoder: str) -> DecoderClient:
    notes = RetryNotes(args.retry_for)
    return DecoderClient(args.decoder or [default_decoder], on_unary_retry=notes.broken)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
