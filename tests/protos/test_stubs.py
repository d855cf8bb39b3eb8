"""The committed stubs are those that the .proto files give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from protos.generate import PROTO_FILES, ROOT

GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def test_committed_stubs_are_fresh(tmp_path: Path) -> None:
    # protoc finds the mypy plug-ins on PATH, beside the interpreter that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    subprocess.run([sys.executable, "-m", "protos.generate", str(tmp_path)], cwd=ROOT, env=environment, check=True)
    for proto_file in PROTO_FILES:
        for suffix in GENERATED_SUFFIXES:
            name = proto_file.removesuffix(".proto") + suffix
            assert (ROOT / name).read_text() == (tmp_path / name).read_text(), f"{name} is stale: run `make stubs`"
