"""The model in plain torch, as files that exports carry: for transformers, timm, ONNX and torch.export."""
