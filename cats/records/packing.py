"""Scores of documents as JSON, compactly: what result files and records keep of every document."""

import base64

import numpy as np


def pack(values: np.ndarray) -> dict:
    """Scores as JSON: bits in base64 for zeros and ones (a tenth of a byte a digit), else rounded numbers."""
    if values.ndim == 1 and np.isin(values, (0, 1)).all():
        bits = base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()
        return {"bits": bits, "count": len(values)}
    return {"values": np.round(values, 5).tolist()}


def unpack(packed: dict) -> np.ndarray:
    """The scores that `pack` wrote."""
    if "values" in packed:
        return np.asarray(packed["values"], dtype=float)
    bits = np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8)
    return np.unpackbits(bits)[: packed["count"]].astype(float)
