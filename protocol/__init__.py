"""The wire: frames, bounded tensors, and a session machine that does no I/O. Knows no carrier."""

from .events import Terms
from .limits import MAX_FRAME_BYTES, METHOD, MINOR, SERVICE
from .loopback import Loopback
from .precision import Precision, read_precision, uniform
from .roles import CloudSession, DeviceSession

__all__ = [
    "MAX_FRAME_BYTES",
    "METHOD",
    "MINOR",
    "SERVICE",
    "CloudSession",
    "DeviceSession",
    "Loopback",
    "Precision",
    "Terms",
    "read_precision",
    "uniform",
]
