"""The cloud: the artifact's TorchScript segments, sessions with their KV cache, one gRPC method. No transformers, no onnx."""
