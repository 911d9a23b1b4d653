"""Runs inside the image's build: takes out of the environment what the server never opens, and compiles what it imports.

    /opt/plora/bin/python -B slim.py

Writes `slimmed.json` into the environment: bytes by what was removed, bytes of bytecode. Standard library alone: the image
has nothing else yet. That nothing needed is gone is proved twice: here by importing the whole server, and by `image.py smoke`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import py_compile
import shutil
import sys
from pathlib import Path

USELESS = {
    "torch's tests": ("torch/test", "torch/lib/*_test.so", "torch/lib/libbackend_with_compiler.so", "torch/lib/libaoti_custom_ops.so"),
    "torch's headers and CMake files": ("torch/include", "torch/share"),
    "torch's test programs and protoc": ("torch/bin/*",),
    "setuptools": ("setuptools", "setuptools-*.dist-info", "_distutils_hack", "distutils-precedence.pth", "pkg_resources"),
    "tests of numpy, sympy and others": ("**/tests",),
    "stubs, headers, static libraries": ("**/*.pyi", "**/*.pxd", "**/*.h", "**/*.hpp", "**/*.a"),
}
"""In site-packages. torch asks for setuptools only to build extensions in C++."""

NEEDED = ("torch/bin/torch_shm_manager",)
"""torch looks for it when it is imported."""

COMMANDS = ("plora-cloud", "python", "python3", "python3.11")
"""All that stays in bin/."""

SERVER = ("plora.cloud_server", "plora.protocol", "plora.artifact")


def size_bytes(path: Path) -> int:
    """Of a file or of all files below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    return path.stat().st_size if path.is_file() else sum(size_bytes(below) for below in path.iterdir())


def remove(packages: Path, commands: Path) -> dict[str, int]:
    """Bytes removed from site-packages and bin/, by what they were."""
    needed = {packages / name for name in NEEDED}
    removed: dict[str, int] = {}
    for what, patterns in USELESS.items():
        removed[what] = 0
        for path in (path for pattern in patterns for path in sorted(packages.glob(pattern)) if path not in needed):
            if path.exists():  # it may lie in a folder that went before
                removed[what] += size_bytes(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in commands.iterdir():
        if path.name not in COMMANDS:
            path.unlink()
    return removed


def import_server() -> None:
    """Every module of the server, and so whatever it needs."""
    for package in map(importlib.import_module, SERVER):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def compile_imported() -> int:
    """Compiles what has been imported, and returns the bytes. Nothing in the bytecode depends on the time of the build."""
    sources = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    written = 0
    for source in sorted(source for source in sources if source.endswith(".py") and source != __file__ and Path(source).exists()):
        compiled = py_compile.compile(source, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        written += Path(str(compiled)).stat().st_size
    return written


def main() -> None:
    environment = Path(sys.prefix)
    if sys.prefix == sys.base_prefix:
        sys.exit("slim.py removes files: run it with the interpreter of the virtual environment that it is to slim")
    (packages,) = environment.glob("lib/python3.*/site-packages")
    before = size_bytes(environment)
    removed = remove(packages, environment / "bin")
    import_server()
    facts = {"installed_bytes": before, "removed_bytes": removed, "bytecode_bytes": compile_imported()}
    (environment / "slimmed.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"slimmed {before / 1e6:.0f} MB by {sum(removed.values()) / 1e6:.0f} MB; {facts['bytecode_bytes'] / 1e6:.0f} MB of bytecode")


if __name__ == "__main__":
    main()
