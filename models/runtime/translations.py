"""What the ONNX exporter must be told about our own torch operators."""


def custom_translations() -> dict:
    return {}
