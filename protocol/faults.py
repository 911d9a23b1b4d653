"""Wire fault codes and the one error type that each becomes on the device."""

from __future__ import annotations

from ..artifact.errors import (
    CloudFailed,
    ContextOverflow,
    PloraError,
    QuotaReached,
    Refused,
    RefusedContract,
    RefusedDtype,
    RefusedFrame,
    RefusedVersion,
    ServerFull,
    ServerStopping,
    SessionExpired,
    printable,
)
from . import plora_pb2 as pb

ERRORS: dict[str, type[PloraError]] = {
    "FAULT_UNSPECIFIED": CloudFailed,
    "BAD_FRAME": RefusedFrame,
    "BAD_STATE": RefusedFrame,
    "BAD_TENSOR": RefusedFrame,
    "BAD_STEP": RefusedFrame,
    "WRONG_VERSION": RefusedVersion,
    "WRONG_CONTRACT": RefusedContract,
    "WRONG_DTYPE": RefusedDtype,
    "FULL": ServerFull,
    "STOPPING": ServerStopping,
    "EXPIRED": SessionExpired,
    "CONTEXT_FULL": ContextOverflow,
    "INTERNAL": CloudFailed,
    "QUOTA": QuotaReached,
}


def fault_error(fault: pb.Fault) -> PloraError:
    """The error that a device raises for a fault from the cloud. A code that we do not know is CloudFailed."""
    known = fault.code in pb.FaultCode.values()
    name = pb.FaultCode.Name(fault.code) if known else f"code {fault.code}"
    kind = ERRORS[name] if known else CloudFailed
    message = f"the cloud refused ({name}): {printable(fault.detail) or 'no detail'}"
    if issubclass(kind, Refused):
        return kind(message, fault.retry_after_millis)
    return kind(message)
