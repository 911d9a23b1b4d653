"""Tensors on the wire: float32 arrays in memory, fp32, fp16 or bf16 little-endian bytes in a frame, bounded by the plan."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import LocalProtocolError, NotFinite, RemoteProtocolError
from ..artifact.shape import DTYPE_BYTES
from . import plora_pb2 as pb

DTYPES: dict[int, str] = {pb.FP32: "fp32", pb.FP16: "fp16", pb.BF16: "bf16"}
CODES: dict[str, pb.Dtype] = {"fp32": pb.FP32, "fp16": pb.FP16, "bf16": pb.BF16}
Floats = NDArray[np.float32]


def encode(values: Floats, dtype: str, rows: int, columns: int, where: str) -> pb.Tensor:
    """values: [rows, columns] float32. Raises LocalProtocolError for another shape or values that are not finite in `dtype`."""
    if values.shape != (rows, columns) or values.dtype != np.float32:
        raise LocalProtocolError(f"{where}: got {list(values.shape)} {values.dtype}, expected [{rows}, {columns}] float32")
    if dtype == "fp32":
        data, finite = np.ascontiguousarray(values, "<f4"), all_finite(values)
    elif dtype == "fp16":
        with np.errstate(over="ignore"):
            data = values.astype("<f2")
        finite = all_finite(data)
    else:
        data = _to_bf16(values)
        finite = ((data & 0x7F80) != 0x7F80).all()
    if not finite:
        raise NotFinite(f"{where}: values that are not finite in {dtype} (largest magnitude {np.abs(values).max():.3g})")
    return pb.Tensor(dtype=CODES[dtype], rows=rows, columns=columns, data=data.tobytes())


def decode(tensor: pb.Tensor, dtype: str, rows: int, columns: int, where: str) -> Floats:
    """[rows, columns] float32. Raises RemoteProtocolError unless dtype, shape, size and values are as the plan says;
    everything is checked before memory is taken."""
    got = DTYPES.get(tensor.dtype, f"code {tensor.dtype}")
    if got != dtype:
        raise RemoteProtocolError(f"{where}: dtype {got}, expected {dtype}", "BAD_TENSOR")
    if (tensor.rows, tensor.columns) != (rows, columns):
        raise RemoteProtocolError(f"{where}: shape [{tensor.rows}, {tensor.columns}], expected [{rows}, {columns}]", "BAD_TENSOR")
    size = rows * columns * DTYPE_BYTES[dtype]
    if len(tensor.data) != size:
        raise RemoteProtocolError(f"{where}: {len(tensor.data)} bytes, expected {size}", "BAD_TENSOR")
    if dtype == "fp32":
        values = np.frombuffer(tensor.data, "<f4")
    elif dtype == "fp16":
        values = np.frombuffer(tensor.data, "<f2").astype(np.float32)
    else:
        values = (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if not all_finite(values):
        raise RemoteProtocolError(f"{where}: values that are not finite", "BAD_TENSOR")
    return values.reshape(rows, columns)


def all_finite(values: NDArray[np.floating]) -> bool:
    """Whether no value is infinite or NaN. A finite sum proves it in one pass; only a sum that is not is looked into."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(np.add.reduce(values, axis=None)) or bool(np.isfinite(values).all())


def _to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as hardware does."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    special = (bits & 0x7F800000) == 0x7F800000
    return (np.where(special, bits, rounded) >> 16).astype("<u2")
