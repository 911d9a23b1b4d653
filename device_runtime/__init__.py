"""The device: edge graphs in onnxruntime, the private text, sampling, and the stream to the cloud. No torch, no transformers.

from plora.device_runtime import open_session

with open_session("out/edge", "127.0.0.1:7070") as session:
    for piece in session.stream_chat([{"role": "user", "content": "Hello"}]):
        print(piece.text, end="", flush=True)

The names come on first use, so that the forecast, which is arithmetic, can be had without grpc and onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import Access
    from .api import Answer, Piece, PrivateSession, open_session
    from .sampling import Sampling

__all__ = ["Access", "Answer", "Piece", "PrivateSession", "Sampling", "open_session"]
_FOUND_IN = {"Access": "access", "Sampling": "sampling"}


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FOUND_IN.get(name, 'api')}", __name__), name)
