"""What a second decoder on the same checkpoint costs in memory: `python -m tests.bench.two_decoders --model DIR`.

Each decoder first computes a long prompt of random tokens, which reads all experts. Proportional memory (PSS) counts a page that
several processes have mapped in equal parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import grpc
import numpy as np

from protos import decoder_pb2, decoder_pb2_grpc
from tests.bench.machine import describe_cpu
from tests.e2e.followed import token_request
from tests.e2e.processes import Decoder, Processes


def memory_of(pid: int, name: str) -> int:
    """One figure of a process in bytes, such as Pss or Anonymous."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in /proc/{pid}/smaps_rollup")


def mapped_share(pid: int, directory: Path) -> int:
    """The proportional bytes of a process's mappings of files below a directory."""
    share, is_below = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            is_below = len(words) > 5 and words[5].startswith(str(directory.resolve()))
        elif is_below and words[0] == "Pss:":
            share += int(words[1]) * 1024
    return share


def read_weights(decoder: Decoder, seed: int, num_tokens: int = 1500) -> None:
    """Has a prompt of random tokens computed; each decoder needs another, or it finds the first one's K/V in the pool."""
    with grpc.insecure_channel(decoder.address) as channel:
        stub = decoder_pb2_grpc.DecoderStub(channel)
        vocab_size = stub.GetModelInfo(decoder_pb2.GetModelInfoRequest(), timeout=10).vocab_size
        prompt = np.random.default_rng(seed).integers(0, vocab_size, num_tokens).tolist()
        for _ in stub.Generate(token_request(prompt, 4), timeout=300):
            pass


def main() -> None:
    """Prints the memory with one and with two decoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--backend", default="native")
    arguments = parser.parse_args()
    print(json.dumps(describe_cpu()), file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory, Processes(Path(directory)) as processes:
        manager = processes.start_manager(num_blocks=256)
        decoders: list[Decoder] = []
        totals = []
        for seed in range(2):
            decoders.append(processes.start_decoder(manager, model=arguments.model, backend=arguments.backend))
            read_weights(decoders[-1], seed)
            pids = [decoder.process.pid for decoder in decoders]
            totals.append(sum(memory_of(pid, "Pss") for pid in pids))
            result = {"decoders": len(pids), "pss_bytes": totals[-1]}
            print(json.dumps(result | {"anonymous_bytes": [memory_of(pid, "Anonymous") for pid in pids]}), flush=True)
    print(json.dumps({"ratio": round(totals[1] / totals[0], 3)}))


if __name__ == "__main__":
    main()
