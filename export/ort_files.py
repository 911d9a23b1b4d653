"""The same edge graphs as `.ort` files, and the operator list from which a reduced onnxruntime for phones is built."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path

from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

from ..artifact.errors import VerificationError
from ..artifact.names import OPERATORS


def write_ort_files(folder: Path, graphs: list[str]) -> list[str]:
    """Converts the `.onnx` graphs of these names in `folder`; returns the new files' names.

    The converter writes a second optimisation level and per-run configs beside them: it works in a folder of its own, and one
    `.ort` per graph is shipped.
    """
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch, "onnx"), Path(scratch, "ort")
        source.mkdir()
        made.mkdir()
        for name in graphs:
            (source / f"{name}.onnx").write_bytes((folder / f"{name}.onnx").read_bytes())
        with contextlib.redirect_stdout(io.StringIO()):
            convert_onnx_models_to_ort(source, made, optimization_styles=[OptimizationStyle.Fixed])
        for name in graphs:
            ort_file = made / f"{name}.ort"
            if not ort_file.is_file():
                raise VerificationError(f"onnxruntime's converter made no {name}.ort; found {sorted(p.name for p in made.iterdir())}")
            (folder / f"{name}.ort").write_bytes(ort_file.read_bytes())
        (operators,) = made.glob("*.config")
        lines = [line for line in operators.read_text().splitlines() if not line.startswith("#")]  # comments name our scratch folder
        (folder / OPERATORS).write_text("\n".join(lines) + "\n")
    return [*(f"{name}.ort" for name in graphs), OPERATORS]
