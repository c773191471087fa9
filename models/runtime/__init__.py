"""From a model in PyTorch to a verified ONNX file, and from prepared images to findings; the latter without torch."""
