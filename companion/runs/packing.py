"""Compress a safetensors file without loss, to about 3.4 bytes a weight.

A float32 weight has a sign, an exponent and a mantissa. The last two bytes of the mantissa are noise, which no
compressor makes smaller. The first byte has few values over a network. So the first bytes of all weights are put one
after the other, then the second bytes, and so on, before zlib sees them.
"""

import json
import math
import zlib

import numpy as np

__all__ = ["pack", "unpack"]


def pack(content: bytes) -> bytes:
    """Compress a whole safetensors file; `unpack` gives it back bit for bit.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    head, parts = _parts(content)
    return zlib.compress(content[:head] + b"".join(_shuffled(content[a:b], width) for a, b, width in parts), 9)


def unpack(packed: bytes) -> bytes:
    """The safetensors file that was packed.

    Raises:
        ValueError: this is not what `pack` gives, or not all of it.
    """
    try:
        content = zlib.decompress(packed)
    except zlib.error as error:
        raise ValueError(f"not a packed network, or not all of it ({error})") from error
    head, parts = _parts(content)  # shuffling leaves lengths, and so the parts, as they are
    return content[:head] + b"".join(_unshuffled(content[a:b], width) for a, b, width in parts)


def _parts(content: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """Where the tensors of a safetensors file begin, and (begin, end, bytes of a value) of each stretch of one width.

    The file is the length of its head (8 bytes), the head as JSON, and the tensors' values one after the other.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    try:
        head = json.loads(content[8:begin])
        tensors = [(*head[key]["data_offsets"], math.prod(head[key]["shape"])) for key in head if key != "__metadata__"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"not a safetensors file, whose head would be JSON ({error})") from error
    at, parts = begin, []
    for start, end, count in sorted(tensors):
        width = max((end - start) // count, 1) if count else 1
        if begin + start != at or (end - start) % width:
            raise ValueError("not a whole safetensors file: its tensors do not follow one another")
        at = begin + end
        if parts and parts[-1][2] == width:
            parts[-1] = (parts[-1][0], at, width)
        else:
            parts.append((begin + start, at, width))
    if at != len(content):
        raise ValueError(f"not a whole safetensors file: {len(content)} bytes instead of {at}")
    return begin, parts


def _shuffled(values: bytes, width: int) -> bytes:
    """The first bytes of all values, then the second bytes, ..."""
    return np.frombuffer(values, np.uint8).reshape(-1, width).T.tobytes()


def _unshuffled(values: bytes, width: int) -> bytes:
    """Inverse of `_shuffled`."""
    return np.frombuffer(values, np.uint8).reshape(width, -1).T.tobytes()
