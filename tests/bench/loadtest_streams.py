"""How late the load test's own event loop is with many streams: `python -m tests.bench.loadtest_streams [--streams 500]`.

The server is another process that keeps a pace, so on two cores the client has one of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--itl", type=float, default=0.25, help="seconds between tokens of a stream")
    parser.add_argument("--duration", type=float, default=15.0)
    args = parser.parse_args()
    tokens = round(args.duration / args.itl)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.paced_decoder", "--itl", str(args.itl), "--tokens", str(tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        target = server.stdout.readline().strip()
        flags = f"--json --quiet --prompts tokens --prompt-tokens 8 --output-tokens {tokens} --users {args.streams}"
        flags += f" --ramp-up 3 --duration {args.duration}"
        done = subprocess.run(
            (sys.executable, "-m", "clients.cli", "loadtest", "--decoder", target, *flags.split()),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.kill()
        server.wait()
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    summary = json.loads(done.stdout)
    lag, dispatch = summary["client"]["lag_s"], summary["client"]["dispatch_lag_s"]
    print(f"streams {args.streams}, {summary['throughput']['output_tokens_per_s']:.0f} tokens/s")
    print(f"client lag     p50 {lag['p50'] * 1e3:.2f} ms, p99 {lag['p99'] * 1e3:.2f} ms, max {lag['max'] * 1e3:.2f} ms")
    print(f"dispatch lag   p99 {dispatch['p99'] * 1e3:.2f} ms")
    itl = summary["latency_s"]["itl"]
    print(
        f"ITL            p50 {itl['p50'] * 1e3:.2f} ms, p99 {itl['p99'] * 1e3:.2f} ms (paced at {args.itl * 1e3:.0f} ms)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
