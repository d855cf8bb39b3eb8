"""How long a decoder takes from exec to its first token over gRPC, and where that goes; the manager runs already.

    python -m tests.bench.cold_start --model DIR --starts 3

Each line has the seconds since exec at which the process logged its stages. `--forget` deletes the fingerprint that is kept
beside the checkpoint before the first start, as for a checkpoint that is started for the first time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from protos import decoder_pb2_grpc
from services.decoder.fingerprint import CACHE_NAME
from tests.bench.machine import describe_cpu
from tests.e2e.followed import token_request
from tests.e2e.processes import Decoder, Manager, Processes, until

STAGES = {
    "loading the model": "imported_s",
    "the model is fingerprinted": "fingerprinted_s",
    "the model is loaded": "loaded_s",
    "serving": "serving_s",
}


def measure(processes: Processes, manager: Manager, model: Path, backend: str) -> dict[str, Any]:
    """One start, up to the first token of a short prompt."""
    began, began_wall = time.perf_counter(), time.time()
    decoder = processes.start_decoder(
        manager, "--max-seqs", "16", model=model, backend=backend, worker_id="w", wait=False
    )
    until(lambda: bool(decoder.events("serving")) or decoder.process.poll() is not None, "the decoder serves", 300)
    serving = decoder.events("serving")
    if not serving:
        raise RuntimeError(decoder.log())
    request = token_request([1, 2, 3], 2)
    with grpc.insecure_channel(serving[0]["address"]) as channel:
        for response in decoder_pb2_grpc.DecoderStub(channel).Generate(request, timeout=300):
            if response.WhichOneof("event") == "delta":
                break
        first_token_s = time.perf_counter() - began
    result = {name: _since(decoder, event, began_wall) for event, name in STAGES.items()}
    decoder.terminate()
    return result | {"first_token_s": round(first_token_s, 3)}


def _since(decoder: Decoder, event: str, began_wall: float) -> float | None:
    lines = decoder.events(event)
    if not lines:
        return None
    return round(datetime.fromisoformat(lines[0]["timestamp"]).timestamp() - began_wall, 3)


def main() -> None:
    """Prints one JSON line a start, and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--forget", action="store_true", help="delete the kept fingerprint first")
    arguments = parser.parse_args()
    print(json.dumps(describe_cpu()), file=sys.stderr)
    if arguments.forget:
        (arguments.model / CACHE_NAME).unlink(missing_ok=True)
    first_tokens = []
    with tempfile.TemporaryDirectory() as directory, Processes(Path(directory)) as processes:
        manager = processes.start_manager(num_blocks=256)
        for _ in range(arguments.starts):
            result = measure(processes, manager, arguments.model, arguments.backend)
            first_tokens.append(result["first_token_s"])
            print(json.dumps(result), flush=True)
    print(json.dumps({"median_first_token_s": statistics.median(first_tokens)}))


if __name__ == "__main__":
    main()
