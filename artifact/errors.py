"""Every error that plora raises on purpose, and the exit code that a command ends with.

    PloraError                     1
    ├── UsageError                 2   a flag or argument that cannot be honoured
    ├── ArtifactError              3   a file of ours that cannot be trusted
    │   ├── MissingFile                it is not there
    │   ├── DamagedFile                size, hash or content is wrong
    │   ├── ManifestError              a key is unknown, missing or of the wrong type
    │   └── WrongPair                  halves, cores or basis that do not belong together
    ├── PlanError                  4   an exchange plan that is not legal
    ├── ModelError                 5   a checkpoint, adapter or data row that cannot be used
    │   ├── UnsupportedModel
    │   ├── AdapterError
    │   └── DataError
    ├── VerificationError          6   the halves do not compute what the unsplit model computes
    ├── ProtocolError              7   a frame that breaks the protocol
    │   ├── LocalProtocolError         we are about to break it
    │   │   └── NotFinite              with a value that is infinite or NaN
    │   └── RemoteProtocolError        the peer broke it
    ├── Refused                    8   the cloud said no; it stands, try as it says
    │   ├── RefusedContract            it serves another artifact
    │   ├── RefusedVersion             it speaks another protocol major
    │   ├── RefusedDtype               it lacks the wire dtype
    │   ├── RefusedFrame               it says that we broke the protocol
    │   ├── ServerFull
    │   ├── AccessDenied               no, an unknown or an expired access token
    │   ├── QuotaReached               this user's share of the cloud is used up
    │   ├── ServerStopping
    │   ├── SessionExpired             idle for too long
    │   └── CloudFailed                something broke there
    ├── Unreachable                9   no connection, or it was lost
    │   └── Untrusted                  something is there that does not show that it is our cloud
    ├── ContextOverflow           10   more tokens than the context holds
    ├── NeedsUnmet                11   no plan meets all that was asked of one
    └── (Ctrl-C)                 130

A message says what was got, what was expected, where, and what to do.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """What a peer says, as it may be shown: no control characters, which a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def first_line(error: Exception) -> str:
    """What a library's error says, without the stack that some add; its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text and where it stands, None for text that UTF-8 can hold. So does Python hold a byte that is no
    text, or a character that was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
    return None


class PloraError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1


class UsageError(PloraError):
    exit_code = 2


class ArtifactError(PloraError):
    exit_code = 3


class MissingFile(ArtifactError):
    pass


class DamagedFile(ArtifactError):
    pass


class ManifestError(ArtifactError):
    pass


class WrongPair(ArtifactError):
    pass


class PlanError(PloraError):
    exit_code = 4


class ModelError(PloraError):
    exit_code = 5


class UnsupportedModel(ModelError):
    pass


class AdapterError(ModelError):
    pass


class DataError(ModelError):
    pass


class VerificationError(PloraError):
    exit_code = 6


class ProtocolError(PloraError):
    exit_code = 7


class LocalProtocolError(ProtocolError):
    pass


class NotFinite(LocalProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.

    `code` is the name of the wire fault code to answer with (protocol/faults.py).
    """

    def __init__(self, message: str, code: str = "BAD_FRAME") -> None:
        super().__init__(message)
        self.code = code


class Refused(PloraError):
    exit_code = 8

    def __init__(self, message: str, retry_after_millis: int = 0) -> None:
        super().__init__(message)
        self.retry_after_millis = retry_after_millis


class RefusedContract(Refused):
    pass


class RefusedVersion(Refused):
    pass


class RefusedDtype(Refused):
    pass


class RefusedFrame(Refused):
    pass


class ServerFull(Refused):
    pass


class AccessDenied(Refused):
    pass


class QuotaReached(Refused):
    pass


class ServerStopping(Refused):
    pass


class SessionExpired(Refused):
    pass


class CloudFailed(Refused):
    pass


class Unreachable(PloraError):
    exit_code = 9


class Untrusted(Unreachable):
    pass


class ContextOverflow(PloraError):
    exit_code = 10


class NeedsUnmet(PloraError):
    exit_code = 11
