"""Import arrows at run time: every module of a package imports while what it must not need is blocked."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import plora.artifact
import plora.cloud_server
import plora.device_runtime
import plora.export
import plora.models
import plora.planner
import plora.protocol

OURS = ("artifact", "protocol", "models", "export", "cloud_server", "device_runtime", "planner")
ALLOWED_OF_OURS = {
    "artifact": (),
    "protocol": ("artifact",),
    "models": ("artifact",),
    "export": ("artifact", "protocol", "models"),
    "cloud_server": ("artifact", "protocol"),
    "device_runtime": ("artifact", "protocol"),
    "planner": ("artifact", "protocol", "models", "device_runtime"),
}
BLOCKED_OF_OTHERS = {
    "artifact": (
        "numpy",
        "torch",
        "grpc",
        "google.protobuf",
        "click",
        "onnx",
        "onnxruntime",
        "transformers",
        "safetensors",
        "tokenizers",
        "jinja2",
    ),
    "protocol": ("grpc", "torch", "onnx", "onnxruntime", "transformers", "safetensors", "tokenizers"),
    "models": ("onnx", "onnxruntime", "grpc"),
    "export": ("grpc",),
    "cloud_server": ("transformers", "onnx", "onnxruntime", "optimum", "safetensors", "tokenizers"),
    "device_runtime": ("torch", "transformers", "onnx", "optimum"),
    "planner": ("grpc", "onnx", "onnxruntime"),
}
BLOCKER = """
import importlib, importlib.machinery, sys, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)
blocked, modules = sys.argv[1].split(","), sys.argv[2].split(",")

class Blocker:  # looking for a blocked package is allowed (libraries do), importing it is not
    def find_spec(self, name, path=None, target=None):
        if any(name == wall or name.startswith(wall + ".") for wall in blocked):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")

    def exec_module(self, module):
        raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
for module in modules:
    importlib.import_module(module)
there = [name for name in sys.modules if any(name == wall or name.startswith(wall + ".") for wall in blocked)]
assert not there, there
"""


def modules_of(package: str) -> list[str]:
    found = getattr(plora, package)
    return [f"plora.{package}", *(f"plora.{package}.{module.name}" for module in pkgutil.iter_modules(found.__path__))]


def import_blocked(modules: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKER, ",".join(blocked), ",".join(modules)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("package", OURS)
def test_every_module_imports_with_the_rest_blocked(package: str) -> None:
    walls = [f"plora.{other}" for other in OURS if other != package and other not in ALLOWED_OF_OURS[package]]
    modules = modules_of(package)
    assert len(modules) > 5
    result = import_blocked(modules, [*walls, *BLOCKED_OF_OTHERS[package]])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "wall"),
    [("plora.device_runtime.edge", "onnxruntime"), ("plora.cloud_server.engine", "torch"), ("plora.protocol.session", "plora.artifact"),
     ("plora.export.verify", "plora.models"), ("plora.protocol.plora_pb2", "google.protobuf")],
)  # fmt: skip
def test_the_blocker_blocks(module: str, wall: str) -> None:
    """The control: what a module does need, it misses."""
    result = import_blocked([module], [wall])
    assert result.returncode != 0
    assert "is blocked" in result.stderr
    assert wall in result.stderr


def test_importing_the_commands_imports_nothing_heavy() -> None:
    """`--help` must not wait for torch."""
    heavy = ["torch", "transformers", "onnxruntime", "onnx", "numpy", "grpc"]
    result = import_blocked(["plora.export.cli", "plora.cloud_server.cli", "plora.planner.cli"], heavy)
    assert result.returncode == 0, result.stderr
