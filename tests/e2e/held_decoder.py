"""A decoder that holds still in the midst of its streams: `python -m tests.e2e.held_decoder --hold-at N --hold-until FILE FLAGS...`.

When it has made N tokens, and sent them, it logs `held` and computes nothing until FILE is there; all else goes on. So a test does
what it does at that very moment, however long either process waits for a processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import structlog

from services.decoder.__main__ import main
from services.decoder.engine import Engine, StepModel

_POLL_S = 0.01


def _hold(num_tokens: int, until: Path) -> None:
    turn = Engine._turn
    is_held = False

    def turn_or_hold(self: Engine, model: StepModel) -> bool:
        nonlocal is_held
        if not is_held and self.meter.num_generated >= num_tokens:
            is_held = True
            self._flush()
            structlog.get_logger("held_decoder").info("held", num_tokens=self.meter.num_generated)
            while not until.exists():
                time.sleep(_POLL_S)
        return turn(self, model)

    Engine._turn = turn_or_hold  # type: ignore[method-assign]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hold-at", type=int, required=True)
    parser.add_argument("--hold-until", type=Path, required=True)
    args, flags = parser.parse_known_args()
    _hold(args.hold_at, args.hold_until)
    sys.exit(main(flags))
