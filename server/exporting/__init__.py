"""A task as a file for other tools: ONNX, or a timm state dict."""
