"""Damage to files, drawn from a seed: to bytes, to lines, and to the values of JSON and YAML."""

import gzip
import json
import random
import re

# A mask of values that a document may have where it had another one.
VALUES = (
    *(
        "null",
        "true",
        '""',
        '"x"',
        "[]",
        "{}",
        "[0]",
        '{"a": 1}',
        "NaN",
        "-Infinity",
        "1e999",
        "-1",
        "0",
        "1.5",
    ),
    *("1e-320", "-0.0", "0.5", "7", "2026-01-01", "1e-5", "~", "yes", '"\\ud800"', "9007199254740993"),
    *("9" * 400, '"' + "long " * 1000 + '"', "[" * 20_000, '"\\u0000"', "&a [*a]", "!!python/object:x {}"),
)
SMALL = tuple(value for value in VALUES if len(value) < 10)  # no size that fills the memory of a machine
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\b(?:true|false|null|[a-z_]+)\b')
_BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\xe2\x80\xa8",
    b'"',
    b"{",
    b"]",
    b",",
    b"\n",
    b"\xed\xa0\x80",
)


def damaged(data: bytes, draw: random.Random, values: tuple[str, ...] = VALUES) -> bytes:
    """`data` after one to three changes of any kind."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice((_value, _value, _value, _line, _line, changed_bytes))(data, draw, values)
    return data


def changed_bytes(data: bytes, draw: random.Random, values: tuple[str, ...] = ()) -> bytes:
    """A bit turned, a part lost, repeated or put elsewhere, something put in, the end cut off, or all."""
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 4, 16, 200))
    part, rest = data[at : at + length], data[at + length :]
    kind = draw.randrange(8)
    if kind < 2 and part:
        return data[:at] + bytes([part[0] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rest
    if kind == 3:
        return data[:at] + part + part + rest
    if kind == 4:
        return data[:at] + draw.choice(_BYTES) + data[at:]
    if kind == 5:
        other = draw.randrange(len(rest) + 1)
        return data[:at] + rest[:other] + part + rest[other:]
    return b"" if kind == 6 and draw.random() < 0.1 else data[:at]


def _value(data: bytes, draw: random.Random, values: tuple[str, ...]) -> bytes:
    """Another value, or another name of a key, in place of one of those written."""
    found = list(_TOKEN.finditer(data))
    if not found:
        return changed_bytes(data, draw)
    token = draw.choice(found)
    new = draw.choice((*values, draw.choice(found)[0].decode(errors="replace"))).encode()
    return data[: token.start()] + new + data[token.end() :]


def _line(data: bytes, draw: random.Random, values: tuple[str, ...]) -> bytes:
    """A line lost, twice, in another place, or with another indentation."""
    lines = data.split(b"\n")
    at, kind = draw.randrange(len(lines)), draw.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    else:
        lines[at] = draw.choice((b" ", b"  ", b"\t", b"- ", b"# ")) + lines[at]
    return b"\n".join(lines)


def damaged_gzip(data: bytes, draw: random.Random, values: tuple[str, ...] = VALUES) -> bytes:
    """Damage to what is compressed, or to the compressed bytes."""
    if draw.random() < 0.6:
        return gzip.compress(damaged(gzip.decompress(data), draw, values))
    return changed_bytes(data, draw)


def damaged_safetensors(data: bytes, draw: random.Random, values: tuple[str, ...] = SMALL) -> bytes:
    """Damage to the header, whose length is right again behind it, to the bytes of numbers, or to a pair."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(4)
    if kind == 0:
        return changed_bytes(data, draw)
    if kind == 1:
        return data[: 8 + length] + changed_bytes(numbers, draw)
    if kind == 2:
        header = damaged(header, draw, values)
    else:  # a tensor under the name of another one, or without a name that anything asks for
        content = json.loads(header)
        names = [name for name in content if name != "__metadata__"]
        one, other = draw.choice(names), draw.choice((*names, "none"))
        content[other] = content.pop(one)
        header = json.dumps(content).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + numbers
