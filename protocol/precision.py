"""What each kind of tensor crosses the wire in, settled in the handshake."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..artifact.errors import UsageError
from . import plora_pb2 as pb
from .tensors import CODES, DTYPES


@dataclass(frozen=True)
class Precision:
    """A dtype (a key of tensors.CODES) for each kind. injections: the entry's too. Raises UsageError for a dtype that does not exist."""

    entry: str = "fp32"
    compressed: str = "fp32"
    injections: str = "fp32"
    exit: str = "fp32"

    def __post_init__(self) -> None:
        for kind, dtype in asdict(self).items():
            if dtype not in CODES:
                raise UsageError(f"wire dtype {dtype!r} for {kind}, expected one of {', '.join(CODES)}")

    @property
    def uniform(self) -> str | None:
        """The one dtype of all kinds, if they are alike."""
        return self.entry if len(set(asdict(self).values())) == 1 else None

    def __str__(self) -> str:
        return self.uniform or ",".join(f"{kind}={dtype}" for kind, dtype in asdict(self).items())


def uniform(dtype: str) -> Precision:
    return Precision(dtype, dtype, dtype, dtype)


def read_precision(text: str) -> Precision:
    """`fp16`, or `entry=fp16,injections=int8`: kinds not named are fp32. Raises UsageError."""
    if "=" not in text:
        return uniform(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    named = [kind for kind, _, _ in pairs]
    kinds = [field.name for field in fields(Precision)]
    if odd := set(named) - set(kinds):
        raise UsageError(f"wire dtype for {sorted(odd)[0]!r}: the kinds are {', '.join(kinds)}")
    if twice := [kind for kind in kinds if named.count(kind) > 1]:
        raise UsageError(f"wire dtype for {twice[0]!r} said twice")
    return Precision(**{kind: dtype for kind, _, dtype in pairs})


def settle(dtype: int, message: pb.Precision | None) -> Precision | str:
    """What a hello or welcome says: one dtype, or all four in `precision` and not all alike. Else why it says nothing that we know."""
    codes = [dtype] * 4 if message is None else [message.entry, message.compressed, message.injections, message.exit]
    if message is not None and (dtype or len(set(codes)) == 1):
        return "a dtype and a precision at once, or a precision of one dtype"
    unknown = [code for code in codes if code not in DTYPES]
    return f"wire dtype code {unknown[0]}; supported: {', '.join(CODES)}" if unknown else Precision(*(DTYPES[code] for code in codes))


def say(precision: Precision, message: pb.Hello | pb.Welcome) -> None:
    """Writes it into a greeting."""
    if precision.uniform:
        message.dtype = CODES[precision.uniform]
    else:
        message.precision.CopyFrom(pb.Precision(**{kind: CODES[dtype] for kind, dtype in asdict(precision).items()}))
