from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    FP32: _ClassVar[Dtype]
    FP16: _ClassVar[Dtype]
    BF16: _ClassVar[Dtype]
    INT8: _ClassVar[Dtype]

class FaultCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAULT_UNSPECIFIED: _ClassVar[FaultCode]
    BAD_FRAME: _ClassVar[FaultCode]
    BAD_STATE: _ClassVar[FaultCode]
    BAD_TENSOR: _ClassVar[FaultCode]
    BAD_STEP: _ClassVar[FaultCode]
    WRONG_VERSION: _ClassVar[FaultCode]
    WRONG_CONTRACT: _ClassVar[FaultCode]
    WRONG_DTYPE: _ClassVar[FaultCode]
    FULL: _ClassVar[FaultCode]
    STOPPING: _ClassVar[FaultCode]
    EXPIRED: _ClassVar[FaultCode]
    CONTEXT_FULL: _ClassVar[FaultCode]
    INTERNAL: _ClassVar[FaultCode]
    QUOTA: _ClassVar[FaultCode]
DTYPE_UNSPECIFIED: Dtype
FP32: Dtype
FP16: Dtype
BF16: Dtype
INT8: Dtype
FAULT_UNSPECIFIED: FaultCode
BAD_FRAME: FaultCode
BAD_STATE: FaultCode
BAD_TENSOR: FaultCode
BAD_STEP: FaultCode
WRONG_VERSION: FaultCode
WRONG_CONTRACT: FaultCode
WRONG_DTYPE: FaultCode
FULL: FaultCode
STOPPING: FaultCode
EXPIRED: FaultCode
CONTEXT_FULL: FaultCode
INTERNAL: FaultCode
QUOTA: FaultCode

class Tensor(_message.Message):
    __slots__ = ("dtype", "rows", "columns", "data", "scales")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    rows: int
    columns: int
    data: bytes
    scales: bytes
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Precision(_message.Message):
    __slots__ = ("entry", "compressed", "injections", "exit")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    INJECTIONS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    entry: Dtype
    compressed: Dtype
    injections: Dtype
    exit: Dtype
    def __init__(self, entry: _Optional[_Union[Dtype, str]] = ..., compressed: _Optional[_Union[Dtype, str]] = ..., injections: _Optional[_Union[Dtype, str]] = ..., exit: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("fp16", "bf16", "resume", "int8")
    FP16_FIELD_NUMBER: _ClassVar[int]
    BF16_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    INT8_FIELD_NUMBER: _ClassVar[int]
    fp16: bool
    bf16: bool
    resume: bool
    int8: bool
    def __init__(self, fp16: _Optional[bool] = ..., bf16: _Optional[bool] = ..., resume: _Optional[bool] = ..., int8: _Optional[bool] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("major", "minor", "contract", "capabilities", "dtype", "session", "precision", "alone")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    contract: bytes
    capabilities: Capabilities
    dtype: Dtype
    session: bytes
    precision: Precision
    alone: bool
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., contract: _Optional[bytes] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., session: _Optional[bytes] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., alone: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("minor", "capabilities", "dtype", "session", "context_tokens", "step_tokens", "idle_millis", "precision", "lease_millis", "window")
    MINOR_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MILLIS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LEASE_MILLIS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    minor: int
    capabilities: Capabilities
    dtype: Dtype
    session: bytes
    context_tokens: int
    step_tokens: int
    idle_millis: int
    precision: Precision
    lease_millis: int
    window: int
    def __init__(self, minor: _Optional[int] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., session: _Optional[bytes] = ..., context_tokens: _Optional[int] = ..., step_tokens: _Optional[int] = ..., idle_millis: _Optional[int] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ..., lease_millis: _Optional[int] = ..., window: _Optional[int] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("step", "position", "exit_rows", "hidden", "injection")
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    EXIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    INJECTION_FIELD_NUMBER: _ClassVar[int]
    step: int
    position: int
    exit_rows: int
    hidden: Tensor
    injection: Tensor
    def __init__(self, step: _Optional[int] = ..., position: _Optional[int] = ..., exit_rows: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., injection: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Compressed(_message.Message):
    __slots__ = ("step", "exchange", "tensor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    exchange: int
    tensor: Tensor
    def __init__(self, step: _Optional[int] = ..., exchange: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Injections(_message.Message):
    __slots__ = ("step", "exchange", "tensor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    exchange: int
    tensor: Tensor
    def __init__(self, step: _Optional[int] = ..., exchange: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Exit(_message.Message):
    __slots__ = ("step", "hidden", "compute_micros")
    STEP_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MICROS_FIELD_NUMBER: _ClassVar[int]
    step: int
    hidden: Tensor
    compute_micros: int
    def __init__(self, step: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., compute_micros: _Optional[int] = ...) -> None: ...

class Truncate(_message.Message):
    __slots__ = ("length",)
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    length: int
    def __init__(self, length: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("step", "length")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    step: int
    length: int
    def __init__(self, step: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Closed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fault(_message.Message):
    __slots__ = ("code", "detail", "retry_after_millis")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MILLIS_FIELD_NUMBER: _ClassVar[int]
    code: FaultCode
    detail: str
    retry_after_millis: int
    def __init__(self, code: _Optional[_Union[FaultCode, str]] = ..., detail: _Optional[str] = ..., retry_after_millis: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: FaultCode
    def __init__(self, code: _Optional[_Union[FaultCode, str]] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("id", "padding", "reply_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    padding: bytes
    reply_bytes: int
    def __init__(self, id: _Optional[int] = ..., padding: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("id", "padding")
    ID_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    id: int
    padding: bytes
    def __init__(self, id: _Optional[int] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("received", "hello", "welcome", "entry", "compressed", "injections", "exit", "truncate", "cancel", "cancelled", "close", "closed", "fault", "abort", "ping", "pong")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    INJECTIONS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    received: int
    hello: Hello
    welcome: Welcome
    entry: Entry
    compressed: Compressed
    injections: Injections
    exit: Exit
    truncate: Truncate
    cancel: Cancel
    cancelled: Cancelled
    close: Close
    closed: Closed
    fault: Fault
    abort: Abort
    ping: Ping
    pong: Pong
    def __init__(self, received: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., entry: _Optional[_Union[Entry, _Mapping]] = ..., compressed: _Optional[_Union[Compressed, _Mapping]] = ..., injections: _Optional[_Union[Injections, _Mapping]] = ..., exit: _Optional[_Union[Exit, _Mapping]] = ..., truncate: _Optional[_Union[Truncate, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ...) -> None: ...
