"""Trains the demo model: `python -m services.decoder.demo_model.train --out DIR`.

Needs PyTorch, and a GPU to be done in minutes; the corpus, the tokenizer and the initial weights
follow from the seed. DIR receives the checkpoint and `training_log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from clients.probes import NAMES, TASKS, Probe, add_filler, make_memory, make_probe
from services.decoder.demo_model.checkpoint_files import read_weights, write_checkpoint
from services.decoder.demo_model.corpus import (
    ANSWER_BIT,
    answer_text,
    make_rows,
    question_text,
    train_tokenizer,
)
from services.decoder.demo_model.network import (
    Network,
    Quantisation,
    Shape,
    Weights,
    init_weights,
    rounded,
)

BATCH_TOKENS = 65_536
# Long rows teach positions up to the model's maximum, short ones are cheaper; by share of steps.
ROW_LENGTHS = (512, 512, 512, 2048, 512, 512, 512, 2048, 512, 512, 512, 4096)
# The rest of a conversation costs little to predict too, and keeps a stream that ignores the end
# of its answer sensible.
PROMPT_LOSS_WEIGHT = 0.1
BALANCE_LOSS_WEIGHT = 0.01
WARMUP_STEPS = 300


def main() -> int:
    """Train, quantise, write and evaluate; the exit code says whether every task reached 99 %."""
    args = _parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    with (args.out / "training_log.jsonl").open("w") as log_file:
        log = _Log(log_file)
        shape, quantisation = Shape(), Quantisation(expert_bits=args.expert_bits)
        log.write(
            "settings",
            seed=args.seed,
            steps=args.steps,
            batch_tokens=args.batch_tokens,
            learning_rate=args.learning_rate,
            quantised_from_step=_first_rounded_step(args),
            shape=asdict(shape),
            quantisation=asdict(quantisation),
        )
        tokenizer = train_tokenizer(args.seed)
        weights = train(args, shape, quantisation, tokenizer, log)
        write_checkpoint(args.out, weights, tokenizer, shape, quantisation)
        weights = read_weights(args.out, quantisation, args.device)
        worst = 1.0
        for dtype in (torch.float32, torch.bfloat16):
            results = evaluate(weights, tokenizer, shape, dtype, args.probes, args.seed)
            log.write("held_out", activations=str(dtype), probes=args.probes, accuracy=results)
            worst = min(worst, *results.values())
    return 0 if worst >= 0.99 else 1


def train(
    args: argparse.Namespace,
    shape: Shape,
    quantisation: Quantisation,
    tokenizer: Tokenizer,
    log: _Log,
) -> Weights:
    """Train from the seed; in the last part the forward pass sees quantised weights."""
    # Started before anything touches the GPU, which a forked process could not use.
    batches = _batches(args, tokenizer)
    first = next(batches)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {k: v.to(device).requires_grad_() for k, v in init_weights(shape, args.seed).items()}
    decayed = [w for w in weights.values() if w.ndim > 1]
    kept = [w for w in weights.values() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    network = Network(shape, compile_parts=args.compile)
    started = time.monotonic()
    for step in range(args.steps):
        rows = torch.from_numpy((first if step == 0 else next(batches)).astype(np.int32)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * _schedule(step, args.steps)
        current = rounded(weights, quantisation) if step >= _first_rounded_step(args) else weights
        loss, balance = _loss(network, {k: w.to(dtype) for k, w in current.items()}, rows)
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE_LOSS_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *kept], 1.0)
        optimizer.step()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            log.write(
                "step",
                step=step + 1,
                loss=round(loss.item(), 5),
                balance=round(balance.item(), 4),
                seconds=round(time.monotonic() - started, 1),
            )
        if (step + 1) % args.eval_every == 0:
            results = evaluate(rounded(weights, quantisation), tokenizer, shape, dtype, 256, 1)
            log.write("held_out", step=step + 1, probes=256, accuracy=results)
    return {name: weight.detach() for name, weight in weights.items()}


def evaluate(
    weights: Weights,
    tokenizer: Tokenizer,
    shape: Shape,
    dtype: torch.dtype,
    num_probes: int,
    seed: int,
) -> dict[str, float]:
    """The share of held-out questions of every kind that greedy decoding answers exactly."""
    rng = random.Random(f"{seed} evaluation")
    conversations = {task: [[make_probe(task, rng, held_out=True)] for _ in range(num_probes)] for task in TASKS}
    num_long = max(1, num_probes // 8)
    conversations["after long filler"] = [
        [add_filler(make_probe(rng.choice(TASKS), rng, held_out=True), rng, 1000)] for _ in range(num_long)
    ]
    conversations["later turn"] = [_long_conversation(rng) for _ in range(num_long)]
    network = Network(shape)
    cast = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    with torch.no_grad():
        return {kind: _share_right(network, cast, tokenizer, items) for kind, items in conversations.items()}


def _long_conversation(rng: random.Random) -> list[Probe]:
    told, asked = make_memory(rng, rng.choice(NAMES), held_out=True)
    between = [make_probe(rng.choice(TASKS), rng) for _ in range(rng.randint(1, 12))]
    return [told, *between, asked]


def _share_right(network: Network, weights: Weights, tokenizer: Tokenizer, conversations: list[list[Probe]]) -> float:
    # Greedy decoding gives the answer exactly when every token of it, and the end of the turn, is
    # the most likely one after the tokens before it. That is one forward pass.
    right = 0
    device = weights["model.norm.weight"].device
    encoded = [_encode(tokenizer, turns) for turns in conversations]
    for start in range(0, len(encoded), 128):
        batch = encoded[start : start + 128]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int32)
        for row, (tokens, _) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        best = network.logits(weights, ids.to(device)).argmax(-1).cpu()
        for row, (tokens, answer_start) in enumerate(batch):
            produced = best[row, answer_start - 1 : len(tokens) - 1].tolist()
            right += produced == tokens[answer_start:]
    return right / len(encoded)


def _encode(tokenizer: Tokenizer, turns: list[Probe]) -> tuple[list[int], int]:
    """A conversation's ids and where its last answer starts."""
    history = "".join(question_text(t.prompt) + answer_text(t.answer) + "\n" for t in turns[:-1])
    ids: list[int] = tokenizer.encode(history + question_text(turns[-1].prompt)).ids
    return ids + tokenizer.encode(answer_text(turns[-1].answer)).ids, len(ids)


def _loss(network: Network, weights: Weights, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = rows & (ANSWER_BIT - 1)
    hidden, balance = network.hidden(weights, ids)
    logits = F.linear(hidden, weights["model.embed_tokens.weight"]).float()
    # The last position of a row has no target, but a full row keeps compiled shapes the same.
    targets = ids.roll(-1, dims=1).reshape(-1).long()
    is_answer = (rows.roll(-1, dims=1) & ANSWER_BIT) != 0
    share = torch.where(is_answer, 1.0, PROMPT_LOSS_WEIGHT)
    share[:, -1] = 0.0
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * share.reshape(-1)).sum() / share.sum(), balance


def _schedule(step: int, steps: int) -> float:
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _first_rounded_step(args: argparse.Namespace) -> int:
    return int(args.steps * args.quantise_from)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.from_str(tokenizer_json)


def _make_batch(job: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    seed, step, batch_tokens = job
    length = min(ROW_LENGTHS[step % len(ROW_LENGTHS)], batch_tokens)
    rng = random.Random(f"{seed} batch {step}")
    assert _worker_tokenizer is not None
    return make_rows(_worker_tokenizer, rng, batch_tokens // length, length)


def _batches(args: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[np.ndarray[Any, np.dtype[np.uint16]]]:
    context = multiprocessing.get_context("fork")
    jobs = [(args.seed, step, args.batch_tokens) for step in range(args.steps)]
    pool = context.Pool(args.workers, _start_worker, (tokenizer.to_str(),))
    with pool:
        yield from pool.imap(_make_batch, jobs)


class _Log:
    """One JSON object a line, to the log file and to standard output."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, event: str, **values: Any) -> None:
        """Append one event."""
        line = json.dumps({"event": event, **values})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--expert-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--quantise-from", type=float, default=0.6, help="share of the steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--eval-every", type=int, default=2_000)
    parser.add_argument("--probes", type=int, default=2_000, help="held-out questions a task")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
