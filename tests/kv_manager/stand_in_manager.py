"""`python -m services.kv_manager` with host memory in place of a GPU's: for tests of everything else."""

from __future__ import annotations

from services import serving
from services.kv_manager.config import parse_args
from services.kv_manager.pool_memory import gpu
from services.kv_manager.service import serve
from services.logs import configure_logs
from tests.gpu_stand_in import StandIn

if __name__ == "__main__":
    flags = parse_args()
    configure_logs(flags.log_level)
    serving.run(serve(flags, lambda _: gpu(StandIn)))
