"""The device: edge graphs in onnxruntime, the private text, sampling, and the stream to the cloud. No torch, no transformers.

from plora.device_runtime import open_session

with open_session("out/edge", "127.0.0.1:7070") as session:
    for piece in session.stream_chat([{"role": "user", "content": "Hello"}]):
        print(piece.text, end="", flush=True)
"""

from .access import Access
from .api import Answer, Piece, PrivateSession, open_session
from .sampling import Sampling

__all__ = ["Access", "Answer", "Piece", "PrivateSession", "Sampling", "open_session"]
