"""Generates the gRPC stubs beside their .proto files: `python -m protos.generate [OUT_DIR]`."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_FILES = ("protos/kv_manager.proto", "protos/decoder.proto")


def generate(out_dir: Path) -> None:
    """Writes stubs and their type stubs for every .proto file under out_dir; raises RuntimeError when protoc fails."""
    import google.rpc

    # The repository root is the include path, so that stubs import each other as `protos.x_pb2`, unedited.
    google_rpc_include = Path(google.rpc.__path__[0]).parent.parent
    wkt_include = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{google_rpc_include}",
        f"-I{wkt_include}",
        f"--python_out={out_dir}",
        f"--mypy_out={out_dir}",
        f"--grpc_python_out={out_dir}",
        f"--mypy_grpc_out={out_dir}",
        *PROTO_FILES,
    ]
    status = protoc.main(arguments)
    if status != 0:
        raise RuntimeError(f"protoc failed with exit status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
