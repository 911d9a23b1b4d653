"""What crosses the wire in which dtype: int8 with its scales, and a dtype for each kind of tensor."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from plora.artifact import ExchangePlan
from plora.artifact.errors import LocalProtocolError, NotFinite, RemoteProtocolError, UsageError
from plora.protocol import DeviceSession, Loopback, Precision, read_precision, tensors, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import Greeting, Opened
from plora.protocol.precision import settle
from plora.protocol.tensors import CODES, LARGEST_INT8, VALUE_BYTES, Floats

from .test_protocol import CONTRACT, ENTRY_PLAN, HIDDEN, PLAN, SHAPE, TERMS, refused, run_step, shape_of, values

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
FLOATS = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


def encoded(array: Floats, dtype: str = "int8") -> pb.Tensor:
    return tensors.encode(array, dtype, *array.shape, "here")


def decoded(tensor: pb.Tensor, dtype: str = "int8") -> Floats:
    return tensors.decode(tensor, dtype, tensor.rows, tensor.columns, "there")


def int8_tensor(quantised: list[list[int]], scales: list[float]) -> pb.Tensor:
    data = np.array(quantised, np.int8)
    return pb.Tensor(
        dtype=pb.INT8, rows=data.shape[0], columns=data.shape[1], data=data.tobytes(), scales=np.array(scales, "<f4").tobytes()
    )


# int8


@settings(max_examples=300, deadline=None)
@given(FLOATS)
def test_int8_is_off_by_half_a_step_of_the_row(array: Floats) -> None:
    tensor = encoded(array)
    got = decoded(tensor)
    exact = array.astype(np.float64)
    step = np.minimum(np.abs(exact), float(LARGEST_INT8)).max(axis=1, keepdims=True) / 127
    # The quotient and the product are rounded to float32, each by at most 127 half units in the last place of a step.
    bound = step * (0.5 + 3 * 127 * 2.0**-24)
    # Below the normal numbers there are too few bits for a scale: such rows become zero.
    bound = np.where(step < TINY, 127 * TINY, bound)
    bound = np.where(np.abs(exact) > float(LARGEST_INT8), np.spacing(np.float32(LARGEST_INT8)) * 2, bound)
    assert (np.abs(got.astype(np.float64) - exact) <= bound).all()


def test_int8_bytes() -> None:
    tensor = encoded(np.array([[127.0, -127.0, 63.4], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.0]], np.float32))
    assert (tensor.rows, tensor.columns, tensor.dtype) == (3, 3, pb.INT8)
    assert np.frombuffer(tensor.data, np.int8).reshape(3, 3).tolist() == [[127, -127, 63], [0, 0, 0], [-127, 64, 0]]  # 63.5: to even
    assert tensor.scales[:8] == bytes.fromhex("0000803f 00000000")
    assert np.frombuffer(tensor.scales, "<f4")[2] == np.float32(0.5) / np.float32(127)
    np.testing.assert_array_equal(decoded(tensor)[:2], [[127.0, -127.0, 63.0], [0.0, 0.0, 0.0]])
    transposed = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert encoded(transposed) == encoded(np.ascontiguousarray(transposed))


@pytest.mark.parametrize("scale", [0.0, 1e-45, TINY, 1e-30, 1.0, 1e30, LARGEST / 127])
def test_rows_of_any_magnitude_stand_side_by_side(scale: float) -> None:
    """A row's scale is its own: what stands beside a huge row keeps its precision."""
    row = np.array([1.0, -0.25, 0.0, 0.75], np.float32)
    array = np.stack([row, (row * 127 * np.float64(scale)).astype(np.float32), row])
    got = decoded(encoded(array))
    np.testing.assert_allclose(got[[0, 2]], np.stack([row, row]), rtol=0, atol=0.5001 / 127)
    np.testing.assert_allclose(got[1], array[1], rtol=0, atol=127 * TINY if scale < TINY else scale * 0.5001)


def test_the_largest_row_that_int8_holds() -> None:
    for largest in (LARGEST, float(LARGEST_INT8), -LARGEST, -float(LARGEST_INT8)):
        got = decoded(encoded(np.array([[largest, 1.0]], np.float32)))
        np.testing.assert_allclose(got, [[largest, 0.0]], rtol=2.0**-23)
    edge = np.float32(LARGEST_INT8) / np.float32(127)
    assert np.isfinite(decoded(int8_tensor([[127]], [float(edge)]))).all()
    with pytest.raises(RemoteProtocolError):
        decoded(int8_tensor([[1]], [float(np.nextafter(edge, np.float32(np.inf)))]))


def test_a_row_whose_scale_would_be_subnormal_is_sent_as_zeros() -> None:
    below, above = np.float32(126 * TINY), np.float32(128 * TINY)
    tensor = encoded(np.array([[below, -below], [above, -above]], np.float32))
    assert np.frombuffer(tensor.scales, "<f4").tolist() == [0.0, float(above / np.float32(127))]
    assert np.frombuffer(tensor.data, np.int8).tolist() == [0, 0, 127, -127]


def test_no_rows() -> None:
    assert decoded(encoded(np.zeros((0, 4), np.float32))).shape == (0, 4)


@settings(max_examples=100, deadline=None)
@given(FLOATS)
def test_int8_again_changes_nothing(array: Floats) -> None:
    """What was rounded once stays as it is, so that a row that is sent on is not rounded twice."""
    once = decoded(encoded(array))
    np.testing.assert_allclose(decoded(encoded(once)), once, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("beside", [0.0, 1.0, LARGEST])
def test_values_that_int8_does_not_hold_are_not_sent(value: float, beside: float) -> None:
    with pytest.raises(NotFinite, match="here: values that are not finite in int8"):
        encoded(np.array([[1.0, 2.0], [beside, value]], np.float32))


BAD_INT8 = {
    "a scale of NaN": (int8_tensor([[1, 2], [0, 0]], [1.0, float("nan")]), "out of range"),
    "an infinite scale": (int8_tensor([[1, 2], [0, 0]], [1.0, float("inf")]), "out of range"),
    "a negative scale": (int8_tensor([[1, 2], [0, 0]], [-1e-30, 1.0]), "out of range"),
    "minus infinity": (int8_tensor([[1, 2], [0, 0]], [float("-inf"), 1.0]), "out of range"),
    "a product that is infinite": (int8_tensor([[1, 127], [0, 0]], [3e36, 1.0]), "out of range"),
    "-128": (int8_tensor([[1, 2], [-128, 0]], [1.0, 1.0]), "out of range"),
    "-128 of a zero row": (int8_tensor([[1, 2], [-128, 0]], [1.0, 0.0]), "out of range"),
    "no scales": (int8_tensor([[1, 2], [3, 4]], []), "0 bytes of scales, expected 8"),
    "a scale too few": (int8_tensor([[1, 2], [3, 4]], [1.0]), "4 bytes of scales, expected 8"),
    "a scale too many": (int8_tensor([[1, 2], [3, 4]], [1.0, 1.0, 1.0]), "12 bytes of scales, expected 8"),
    "half a scale": (pb.Tensor(dtype=pb.INT8, rows=2, columns=2, data=bytes(4), scales=bytes(6)), "6 bytes of scales, expected 8"),
    "a value too few": (pb.Tensor(dtype=pb.INT8, rows=2, columns=2, data=bytes(3), scales=bytes(8)), "3 bytes, expected 4"),
    "fp16 in its place": (pb.Tensor(dtype=pb.FP16, rows=2, columns=2, data=bytes(8)), "dtype fp16, expected int8"),
}


@pytest.mark.parametrize("name", BAD_INT8)
def test_bad_int8_is_refused(name: str) -> None:
    tensor, message = BAD_INT8[name]
    with pytest.raises(RemoteProtocolError, match=f"there: .*{message}") as caught:
        decoded(tensor)
    assert caught.value.code == "BAD_TENSOR"


def test_a_scale_of_zero_makes_zeros() -> None:
    np.testing.assert_array_equal(decoded(int8_tensor([[1, -127], [3, 4]], [0.0, 2.0])), [[0.0, 0.0], [6.0, 8.0]])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_other_dtypes_have_no_scales(dtype: str) -> None:
    tensor = encoded(values(2, 3), dtype)
    assert tensor.scales == b""
    tensor.scales = bytes(8)
    with pytest.raises(RemoteProtocolError, match="there: 8 bytes of scales, expected 0") as caught:
        decoded(tensor, dtype)
    assert caught.value.code == "BAD_TENSOR"


# Names


@pytest.mark.parametrize("dtype", CODES)
def test_one_dtype_for_all(dtype: str) -> None:
    assert read_precision(dtype) == uniform(dtype) == Precision(dtype, dtype, dtype, dtype)
    assert str(uniform(dtype)) == uniform(dtype).uniform == dtype


def test_a_dtype_for_each_kind() -> None:
    assert read_precision("entry=fp16,injections=int8") == Precision("fp16", "fp32", "int8", "fp32")
    assert read_precision("exit=bf16") == Precision(exit="bf16")
    assert read_precision("entry=fp32") == Precision() == uniform("fp32")
    mixed = Precision("fp16", "int8", "bf16", "fp32")
    assert mixed.uniform is None
    assert str(mixed) == "entry=fp16,compressed=int8,injections=bf16,exit=fp32"
    for first, second in product(CODES, repeat=2):
        precision = Precision(first, second, second, first)
        assert read_precision(str(precision)) == precision


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8", r"wire dtype 'fp8' for entry, expected one of fp32, fp16, bf16, int8"),
        ("", "wire dtype '' for entry"),
        ("FP16", "wire dtype 'FP16' for entry"),
        ("exit=int4", "wire dtype 'int4' for exit"),
        ("exit=", "wire dtype '' for exit"),
        ("hidden=fp16", "wire dtype for 'hidden': the kinds are entry, compressed, injections, exit"),
        ("fp16,exit=fp32", "wire dtype for 'fp16': the kinds are"),
        ("exit=fp16,", "wire dtype for '': the kinds are"),
        ("exit=fp16, entry=fp16", "wire dtype for ' entry': the kinds are"),
        ("exit=fp16,entry=int8,exit=fp32", "wire dtype for 'exit' said twice"),
    ],
)
def test_a_precision_that_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_precision(text)


def test_a_machine_of_no_dtype() -> None:
    with pytest.raises(UsageError, match="wire dtype 'int4' for exit"):
        DeviceSession(PLAN, SHAPE, CONTRACT, Precision(exit="int4"))


# The handshake

MIXED = Precision("fp16", "int8", "bf16", "fp32")


def greeted(precision: Precision) -> Loopback:
    wire = Loopback(PLAN, SHAPE, CONTRACT, precision)
    assert wire.to_cloud(wire.device.hello()) == Greeting(precision, b"", resume=True)
    return wire


@pytest.mark.parametrize(
    "precision", [uniform("int8"), MIXED, Precision(injections="int8"), Precision("int8", "int8", "int8", "fp16")], ids=str
)
def test_a_precision_is_agreed_upon(precision: Precision) -> None:
    wire = greeted(precision)
    terms = replace(TERMS, precision=precision)
    assert wire.to_device(wire.cloud.welcome(terms)) == Opened(terms)
    hello, welcome = (pb.Frame.FromString(data) for _, data in wire.transcript)
    for said in (hello.hello, welcome.welcome):
        assert said.HasField("precision") == (precision.uniform is None)
        assert bool(said.dtype) == (precision.uniform is not None)


def said(**codes: int) -> pb.Precision:
    return pb.Precision(**codes)  # type: ignore[arg-type]


NOT_CANONICAL: dict[str, tuple[int, pb.Precision | None, str]] = {
    "a precision of one dtype": (0, said(entry=2, compressed=2, injections=2, exit=2), "a precision of one dtype"),
    "both": (pb.FP16, said(entry=2, compressed=1, injections=1, exit=1), "a dtype and a precision at once"),
    "an empty precision": (0, said(), "a precision of one dtype"),
    "an empty precision beside a dtype": (pb.FP32, said(), "a dtype and a precision at once"),
    "a kind left out": (0, said(entry=2, compressed=1, injections=1), "wire dtype code 0; supported: fp32, fp16, bf16, int8"),
    "an unknown dtype": (0, said(entry=2, compressed=1, injections=9, exit=1), "wire dtype code 9; supported"),
    "a negative dtype": (0, said(entry=2, compressed=1, injections=-1, exit=1), "wire dtype code -1"),
    "nothing": (0, None, "wire dtype code 0"),
}


@pytest.mark.parametrize("name", NOT_CANONICAL)
def test_one_way_to_say_each_precision(name: str) -> None:
    dtype, precision, message = NOT_CANONICAL[name]
    wire = Loopback(PLAN, SHAPE, CONTRACT, MIXED)
    hello = pb.Frame.FromString(wire.device.hello())
    hello.hello.ClearField("precision")
    hello.hello.dtype = dtype  # type: ignore[assignment]
    if precision is not None:
        hello.hello.precision.CopyFrom(precision)
    refused(wire.cloud, hello, "WRONG_DTYPE", message)

    wire = greeted(MIXED)
    welcome = pb.Frame.FromString(wire.cloud.welcome(replace(TERMS, precision=MIXED)))
    welcome.welcome.ClearField("precision")
    welcome.welcome.dtype = dtype  # type: ignore[assignment]
    if precision is not None:
        welcome.welcome.precision.CopyFrom(precision)
    refused(wire.device, welcome, "WRONG_DTYPE", f"welcome with .*{message}.*, asked for {MIXED}")


def test_a_welcome_in_another_precision() -> None:
    for other in (Precision("fp16", "int8", "bf16", "bf16"), uniform("fp16")):
        wire = greeted(MIXED)
        refused(wire.device, wire.cloud.welcome(replace(TERMS, precision=other)), "WRONG_DTYPE", f"welcome with {other}, asked for {MIXED}")


# Tensors of each kind


def tensors_of(frame: pb.Frame) -> dict[str, pb.Tensor]:
    """Kind of tensor -> the frame's tensor of that kind."""
    kind = frame.WhichOneof("kind") or ""
    message = getattr(frame, kind)
    if kind == "entry":
        return {"entry": message.hidden} | ({"injections": message.injection} if message.HasField("injection") else {})
    if kind == "exit":
        return {"exit": message.hidden} if message.HasField("hidden") else {}
    return {kind: message.tensor} if kind in ("compressed", "injections") else {}


@pytest.mark.parametrize("plan", [PLAN, ENTRY_PLAN], ids=["exchanges", "entry"])
@pytest.mark.parametrize("precision", [MIXED, Precision("bf16", "fp32", "int8", "fp16"), Precision(exit="int8"), uniform("bf16")], ids=str)
def test_each_kind_in_its_dtype(precision: Precision, plan: ExchangePlan) -> None:
    wire = Loopback(plan, shape_of(HIDDEN, 2), CONTRACT, precision)
    wire.to_cloud(wire.device.hello())
    wire.to_device(wire.cloud.welcome(replace(TERMS, precision=precision)))
    device, cloud, tokens, rows = wire.device, wire.cloud, 3, 2
    held = plan.entry_exchange
    wire.to_cloud(device.entry(values(tokens, HIDDEN), rows, values(tokens, held.injection_columns) if held else None))
    for exchange in plan.exchanges:
        wire.to_device(cloud.compressed(values(tokens, exchange.compressed_columns)))
        wire.to_cloud(device.injections(values(tokens, exchange.injection_columns)))
    wire.to_device(cloud.exit(values(rows, HIDDEN)))
    seen = set()
    for _, data in wire.transcript:
        for kind, tensor in tensors_of(pb.Frame.FromString(data)).items():
            dtype = asdict(precision)[kind]
            seen.add(kind)
            assert tensor.dtype == CODES[dtype]
            assert len(tensor.data) == tensor.rows * tensor.columns * VALUE_BYTES[dtype]
            assert len(tensor.scales) == (4 * tensor.rows if dtype == "int8" else 0)
            assert tensor.rows == (rows if kind == "exit" else tokens)
    assert seen == ({"entry", "injections", "exit"} if held else {"entry", "compressed", "injections", "exit"})


@pytest.mark.parametrize("kind", ["entry", "compressed", "injections", "exit"])
@pytest.mark.parametrize("other", ["fp32", "fp16", "bf16", "int8"])
def test_another_kinds_dtype_is_refused(kind: str, other: str) -> None:
    if asdict(MIXED)[kind] == other:
        return
    wire = greeted(MIXED)
    wire.to_device(wire.cloud.welcome(replace(TERMS, precision=MIXED)))
    entry = wire.device.entry(values(2, HIDDEN), 1)
    frames = {"entry": (entry, wire.cloud)}
    if kind != "entry":
        wire.to_cloud(entry)
        frames["compressed"] = (wire.cloud.compressed(values(2, 2)), wire.device)
    if kind in ("injections", "exit"):
        wire.to_device(frames["compressed"][0])
        frames["injections"] = (wire.device.injections(values(2, 6)), wire.cloud)
    if kind == "exit":
        wire.to_cloud(frames["injections"][0])
        wire.to_device(wire.cloud.compressed(values(2, 2)))
        wire.to_cloud(wire.device.injections(values(2, 6)))
        frames["exit"] = (wire.cloud.exit(values(1, HIDDEN)), wire.device)
    data, receiver = frames[kind]
    frame = pb.Frame.FromString(data)
    ((_, tensor),) = tensors_of(frame).items()
    tensor.CopyFrom(encoded(values(tensor.rows, tensor.columns), other))
    refused(receiver, frame, "BAD_TENSOR", f"dtype {other}, expected {asdict(MIXED)[kind]}")


def test_int8_of_values_that_it_holds_exactly() -> None:
    """A whole session in int8 whose rows are multiples of a 127th: nothing is lost."""
    wire = greeted(uniform("int8"))
    wire.to_device(wire.cloud.welcome(replace(TERMS, precision=uniform("int8"))))
    exact = np.array([[127.0, -127.0, 1.0, 0.0, 64.0, -3.0, 2.0, 5.0]], np.float32) / 8
    begun = wire.to_cloud(wire.device.entry(exact, 1))
    np.testing.assert_array_equal(begun.hidden, exact)  # type: ignore[union-attr]


def test_the_step_of_a_machine_that_refuses_a_value_is_not_begun() -> None:
    wire = greeted(uniform("int8"))
    wire.to_device(wire.cloud.welcome(replace(TERMS, precision=uniform("int8"))))
    bad = values(2, HIDDEN)
    bad[0, 0] = np.inf
    with pytest.raises(LocalProtocolError, match="step 1, entry: values that are not finite in int8"):
        wire.device.entry(bad, 1)
    assert wire.device.steps == []
    wire.to_cloud(wire.device.entry(values(2, HIDDEN), 1))


def test_a_cloud_takes_whatever_precision_is_asked_of_it() -> None:
    for codes in product((pb.FP32, pb.FP16, pb.BF16, pb.INT8), repeat=4):
        message = None if len(set(codes)) == 1 else said(**dict(zip(("entry", "compressed", "injections", "exit"), codes)))
        settled = settle(codes[0] if message is None else 0, message)
        assert isinstance(settled, Precision)
        assert [CODES[dtype] for dtype in asdict(settled).values()] == list(codes)


def test_run_step_in_int8_shows_that_int8_rounds() -> None:
    """The exact check of every tensor, which every other dtype passes."""
    wire = greeted(uniform("int8"))
    wire.to_device(wire.cloud.welcome(replace(TERMS, precision=uniform("int8"))))
    with pytest.raises(AssertionError):
        run_step(wire, 3, 1)
