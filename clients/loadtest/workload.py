"""What is asked, and what the right answer is: conversations, each the same for the same seed whatever the timing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clients.loadtest.lengths import Numbers, SpecError, pick
from clients.probes import FILLER_SEPARATOR, Probe, is_correct, make_probe, make_story
from protos import decoder_pb2 as pb

_PROBE_MAX_TOKENS = 96  # longer than any right answer


@dataclass(frozen=True)
class Mix:
    """What is mixed in, by share of the requests."""

    cancel_share: float = 0.0
    deadline_share: float = 0.0
    deadline_s: float = 1.0
    priorities: Sequence[tuple[str, float]] = ()
    tenants: Sequence[tuple[str, float]] = ()
    temperature: float = 0.0


@dataclass
class Ask:
    """One request as it is to be sent."""

    request: pb.GenerateRequest
    tenant: str = ""
    cancel_after_tokens: int | None = None
    timeout_s: float | None = None
    probe: Probe | None = None  # None: the answer is not known beforehand

    def check(self, text: str) -> bool | None:
        """Whether the text is the right answer; None when that is not known."""
        return None if self.probe is None else is_correct(self.probe, text)


class Conversation(Protocol):
    """Turns that build on one another."""

    @property
    def num_turns(self) -> int:
        """How many turns it has."""

    def next(self) -> Ask:
        """The next turn's request."""

    def take(self, text: str, token_ids: Sequence[int]) -> None:
        """The answer to it, which the next turn builds on."""


class Workload(Protocol):
    """Makes conversations by their number."""

    def conversation(self, index: int) -> Conversation:
        """The index-th conversation, always the same one."""


@dataclass(frozen=True)
class RepeatedWorkload:
    """The first `num_distinct` conversations of another workload, over and over."""

    inner: Workload
    num_distinct: int

    def conversation(self, index: int) -> Conversation:
        """The index-th conversation, the same as the one num_distinct before."""
        return self.inner.conversation(index % self.num_distinct)


def dress(ask: Ask, mix: Mix, rng: random.Random, seed: int) -> Ask:
    """Gives a request its seed, and what the mix draws for it."""
    ask.request.sampling.temperature = mix.temperature
    ask.request.sampling.seed = seed
    ask.tenant = pick(mix.tenants, rng, "")
    priority = int(pick(mix.priorities, rng, "0"))
    if priority:
        ask.request.priority = priority
    fate = rng.random()
    if fate < mix.cancel_share:
        ask.cancel_after_tokens = rng.randint(1, max(1, min(ask.request.stop.max_tokens or 32, 32) // 2))
    elif fate < mix.cancel_share + mix.deadline_share:
        ask.timeout_s = mix.deadline_s
    return ask


@dataclass(frozen=True)
class ProbeWorkload:
    """Questions with one right answer, asked through the chat template, each after `prefix_words` of a shared story."""

    tasks: Sequence[str]
    turns: int
    mix: Mix
    seed: int
    prefix_words: int = 0
    num_prefixes: int = 1

    def conversation(self, index: int) -> Conversation:
        """The index-th conversation, always the same one."""
        rng = random.Random(f"{self.seed}:{index}")
        prefix = ""
        if self.prefix_words:
            prefix = _story(random.Random(f"{self.seed}:prefix:{index % self.num_prefixes}"), self.prefix_words)
        return _ProbeConversation(self, rng, index, prefix)


@dataclass
class _ProbeConversation:
    workload: ProbeWorkload
    rng: random.Random
    index: int
    prefix: str
    messages: list[pb.ChatMessage] = field(default_factory=list)

    @property
    def num_turns(self) -> int:
        return self.workload.turns

    def next(self) -> Ask:
        probe = make_probe(self.rng.choice(list(self.workload.tasks)), self.rng, held_out=True)
        question = self.prefix + FILLER_SEPARATOR + probe.prompt if self.prefix and not self.messages else probe.prompt
        self.messages.append(pb.ChatMessage(role="user", content=question))
        request = pb.GenerateRequest(
            chat=pb.Chat(messages=self.messages), stop=pb.StopConditions(max_tokens=_PROBE_MAX_TOKENS)
        )
        return dress(Ask(request, probe=probe), self.workload.mix, self.rng, self.index)

    def take(self, text: str, token_ids: Sequence[int]) -> None:
        self.messages.append(pb.ChatMessage(role="assistant", content=text))


@dataclass(frozen=True)
class TokenWorkload:
    """Random token ids of given lengths; a shared prefix comes first, and every output is as long as it is asked to be."""

    prompt_tokens: Numbers
    output_tokens: Numbers
    vocab_size: int
    turns: int
    mix: Mix
    seed: int
    prefix_tokens: int = 0
    num_prefixes: int = 1

    def conversation(self, index: int) -> Conversation:
        """The index-th conversation, always the same one."""
        rng = random.Random(f"{self.seed}:{index}")
        prefix_rng = random.Random(f"{self.seed}:prefix:{index % self.num_prefixes}")
        prefix = [prefix_rng.randrange(self.vocab_size) for _ in range(self.prefix_tokens)]
        return _TokenConversation(self, rng, index, prefix)


@dataclass
class _TokenConversation:
    workload: TokenWorkload
    rng: random.Random
    index: int
    ids: list[int]

    @property
    def num_turns(self) -> int:
        return self.workload.turns

    def next(self) -> Ask:
        work = self.workload
        self.ids += [
            self.rng.randrange(work.vocab_size) for _ in range(work.prompt_tokens.draw_whole(self.rng, self.index))
        ]
        max_tokens = work.output_tokens.draw_whole(self.rng, self.index)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=self.ids), stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True)
        )
        return dress(Ask(request), work.mix, self.rng, self.index)

    def take(self, text: str, token_ids: Sequence[int]) -> None:
        self.ids += token_ids


@dataclass(frozen=True)
class FileWorkload:
    """Requests from a file of JSON lines, in turn: prompt, token_ids or messages; max_tokens and answer where given."""

    entries: Sequence[dict[str, Any]]
    mix: Mix
    seed: int

    def conversation(self, index: int) -> Conversation:
        """The index-th conversation, always the same one."""
        return _FileConversation(self, index)


@dataclass
class _FileConversation:
    workload: FileWorkload
    index: int
    num_turns: int = 1

    def next(self) -> Ask:
        entry = self.workload.entries[self.index % len(self.workload.entries)]
        request = pb.GenerateRequest()
        if "token_ids" in entry:
            request.token_ids.ids.extend(entry["token_ids"])
        elif "messages" in entry:
            for message in entry["messages"]:
                request.chat.messages.add(role=message["role"], content=message["content"])
        else:
            request.text = entry["prompt"]
        if "max_tokens" in entry:
            request.stop.max_tokens = entry["max_tokens"]
        answer = entry.get("answer")
        probe = None if answer is None else Probe("file", "", answer)
        rng = random.Random(f"{self.workload.seed}:{self.index}")
        return dress(Ask(request, probe=probe), self.workload.mix, rng, self.index)

    def take(self, text: str, token_ids: Sequence[int]) -> None:
        """One turn has no next one."""


def read_requests(path: str) -> list[dict[str, Any]]:
    """The entries of a request file; raises SpecError naming the line that is wrong."""
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except OSError as error:
        raise SpecError(f"--requests-file: {error}") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SpecError(f"--requests-file: {path}:{number} is no JSON ({error})") from error
        if not isinstance(entry, dict) or not entry.keys() & {"prompt", "token_ids", "messages"}:
            raise SpecError(f"--requests-file: {path}:{number} has none of prompt, token_ids, messages")
        entries.append(entry)
    if not entries:
        raise SpecError(f"--requests-file: {path} holds no requests")
    return entries


def _story(rng: random.Random, num_words: int) -> str:
    words: list[str] = []
    while len(words) < num_words:
        words += make_story(rng)[1].split()
    return " ".join(words[:num_words])
