"""The conversation in a terminal: what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.clients.conftest import Serve
from tests.clients.fake_decoder import Answer, FakeDecoder

ANSWER = Answer(["Hel", "lo\x1b[31m", "!"])


class Terminal:
    """The other end of a pseudo-terminal that `leasehold chat` runs in."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self._theirs = theirs
        self._seen = ""
        self._more = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    def _read(self) -> None:
        try:
            self._seen += os.read(self._ours, 4096).decode(errors="replace")
        except OSError:  # EIO: the other end is closed
            asyncio.get_running_loop().remove_reader(self._ours)
        self._more.set()

    async def start(self, target: str) -> None:
        argv = (sys.executable, "-m", "clients.cli", "chat", "--decoder", target)
        self.process = await asyncio.create_subprocess_exec(
            *argv, stdin=self._theirs, stdout=self._theirs, stderr=self._theirs, start_new_session=True
        )
        os.close(self._theirs)

    async def expect(self, text: str) -> str:
        """Waits for the text, and takes all up to it out of what was seen."""
        async with asyncio.timeout(60):
            while text not in self._seen:
                self._more.clear()
                await self._more.wait()
        before, self._seen = self._seen.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)

    async def interrupt_at_prompt(self) -> None:
        """Ctrl-C while readline waits: between its prompt and its wait, CPython keeps a signal until the next key."""
        assert self.process is not None
        stat = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        async with asyncio.timeout(60):
            while stat.read_text().rsplit(")", 1)[1].split()[0] != "S":  # noqa: ASYNC110, ASYNC240  # another process
                await asyncio.sleep(0)
        self.interrupt()

    async def code(self) -> int:
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), 60)

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@pytest_asyncio.fixture
async def terminal() -> AsyncIterator[Terminal]:
    made = Terminal()
    yield made
    await made.close()


async def test_ctrl_d_leaves_and_control_characters_do_not_reach_the_terminal(
    serve_decoder: Serve, terminal: Terminal
) -> None:
    await terminal.start(await serve_decoder(FakeDecoder(ANSWER)))
    await terminal.expect("> ")
    terminal.type("hi\n")
    answer = await terminal.expect("!")
    assert "Hello[31m" in answer
    await terminal.expect("> ")
    terminal.type("\x04")
    assert await terminal.code() == 0


async def test_ctrl_c_cancels_the_answer_and_twice_leaves(serve_decoder: Serve, terminal: Terminal) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 2
    await terminal.start(await serve_decoder(decoder))
    await terminal.expect("> ")
    terminal.type("hi\n")
    await terminal.expect("Hel")
    terminal.interrupt()
    await asyncio.wait_for(decoder.cancelled.wait(), 60)
    decoder.hangs_after = None
    await terminal.expect("> ")
    terminal.type("again\n")
    await terminal.expect("!")
    await terminal.expect("> ")
    assert [m.content for m in decoder.requests[1].chat.messages] == ["hi", "Hel", "again"]
    await terminal.interrupt_at_prompt()
    await terminal.expect("leaves)")
    await terminal.expect("> ")
    await terminal.interrupt_at_prompt()
    assert await terminal.code() == 130
