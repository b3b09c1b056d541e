"""Models for others to run: StableHLO and ONNX programs, and state dicts for PyTorch code bases."""
