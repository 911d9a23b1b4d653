"""Checkpoint and adapter to an artifact folder: cloud half (TorchScript), edge half (ONNX), verified, then published."""
