"""Tensors on the wire: float32 arrays in memory; fp32, fp16, bf16 or int8 little-endian bytes in a frame, bounded by the plan.

int8 is symmetric with one scale per token: value = scale * q, scale = largest magnitude of the row / 127 (the absmax quantisation of
LLM.int8(), arXiv 2208.07339, section 2.1, row by row)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import LocalProtocolError, NotFinite, RemoteProtocolError
from ..artifact.shape import DTYPE_BYTES
from . import plora_pb2 as pb

DTYPES: dict[int, str] = {pb.FP32: "fp32", pb.FP16: "fp16", pb.BF16: "bf16", pb.INT8: "int8"}
CODES: dict[str, pb.Dtype] = {"fp32": pb.FP32, "fp16": pb.FP16, "bf16": pb.BF16, "int8": pb.INT8}
VALUE_BYTES = {**DTYPE_BYTES, "int8": 1}
LEVELS = 127
LARGEST_INT8 = np.nextafter(np.finfo(np.float32).max, np.float32(0))
"""The largest magnitude of an int8 row: of the next float32 a 127th, times 127, is infinite."""
Floats = NDArray[np.float32]


def encode(values: Floats, dtype: str, rows: int, columns: int, where: str) -> pb.Tensor:
    """values: [rows, columns] float32. Raises LocalProtocolError for another shape or values that are not finite in `dtype`."""
    if values.shape != (rows, columns) or values.dtype != np.float32:
        raise LocalProtocolError(f"{where}: got {list(values.shape)} {values.dtype}, expected [{rows}, {columns}] float32")
    if dtype == "int8":
        return _encode_int8(values, rows, columns, where)
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
    size = rows * columns * VALUE_BYTES[dtype]
    if len(tensor.data) != size:
        raise RemoteProtocolError(f"{where}: {len(tensor.data)} bytes, expected {size}", "BAD_TENSOR")
    if len(tensor.scales) != (4 * rows if dtype == "int8" else 0):
        raise RemoteProtocolError(
            f"{where}: {len(tensor.scales)} bytes of scales, expected {4 * rows if dtype == 'int8' else 0}", "BAD_TENSOR"
        )
    if dtype == "int8":
        return _decode_int8(tensor, rows, columns, where)
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


def _encode_int8(values: Floats, rows: int, columns: int, where: str) -> pb.Tensor:
    largest = np.abs(values).max(axis=1, initial=0.0)
    if not all_finite(largest):
        raise NotFinite(f"{where}: values that are not finite in int8 (largest magnitude {largest.max():.3g})")
    scales = (np.minimum(largest, LARGEST_INT8) / LEVELS).astype("<f4")
    scales[scales < np.finfo(np.float32).tiny] = 0.0  # such scales have too few bits left; the row is as good as zero
    steps = np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    data = np.clip(np.rint(values / steps), -LEVELS, LEVELS).astype(np.int8)
    return pb.Tensor(dtype=pb.INT8, rows=rows, columns=columns, data=data.tobytes(), scales=scales.tobytes())


def _decode_int8(tensor: pb.Tensor, rows: int, columns: int, where: str) -> Floats:
    scales = np.frombuffer(tensor.scales, "<f4")
    quantised = np.frombuffer(tensor.data, np.int8).reshape(rows, columns)
    if not ((scales >= 0) & (scales <= LARGEST_INT8 / LEVELS)).all() or (quantised == -LEVELS - 1).any():
        raise RemoteProtocolError(f"{where}: int8 values or scales out of range", "BAD_TENSOR")
    return quantised * scales[:, None].astype(np.float32)
