"""How a sound JSON value or file becomes a hostile one: values nobody expects, in places taken at random."""

import copy
import json
import struct
from random import Random

NAMES = ("", "a" * 5000, "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "é", "𝔘" * 300, "a\nb", "%s{}", ".", "-")
NUMBERS = (0, -1, 1, 2, 3, 7, 65537, 2**24, 2**31, 2**48, 2**63, 2**64 - 1, 10**40, 10**150, 0.5, 1e308, -0.0, 10**4000)
OTHERS = (None, True, False, [], {}, [[]], {"": {}}, float("inf"), float("nan"), "\ud800", [0] * 3000, "@deep@")


def change(value, random: Random, most: int = 3):
    """A copy of a JSON value with up to `most` places of it replaced, removed, doubled or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(random.randrange(most + 1)):
        parent, key = value, None
        while isinstance(parent, dict | list) and parent:
            key = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            if not isinstance(parent[key], dict | list) or not parent[key] or random.random() < 0.3:
                break
            parent = parent[key]
        if key is None or not isinstance(parent, dict | list):
            return copy.deepcopy(random.choice(OTHERS))
        new = copy.deepcopy(random.choice(random.choice([NAMES, NUMBERS, OTHERS])))
        match random.randrange(6):
            case 0:
                del parent[key]
            case 1:
                parent[key] = [parent[key]]
            case 2 if isinstance(parent, dict):
                parent[random.choice(NAMES)] = parent.pop(key)
            case 3 if isinstance(parent, list):
                parent += parent[:50]
            case _:
                parent[key] = new
    return value


def written(value, random: Random) -> bytes:
    """A JSON value as bytes, one time in three in a way that no writer of JSON writes."""
    text = json.dumps(value, indent=random.choice([None, 1]))
    depth = random.choice([10, 64, 400, 900, 100_000])
    text = text.replace('"@deep@"', '{"a":' * depth + "1" + "}" * depth)
    if random.random() < 0.67:
        return text.encode()
    return random.choice(
        [
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32"),
            lambda: b"\xef\xbb\xbf" + text.encode(),
            lambda: text.replace("{", '{"a": 1, "a": 2,', 1).encode(),
            lambda: text.encode() + b"\0",
            lambda: b"",
            lambda: text.replace("1", "9" * random.choice([101, 5000]), 1).encode(),
            lambda: text.replace('"', "'").encode(),
            lambda: damaged(text.encode(), random),
            lambda: text.replace(":", ':"\\ud800",', 1).encode(),
            lambda: b"[" * 200_000,
            lambda: b"[" + b"[]," * 10**6 + b"[]]",
        ]
    )()


def damaged(raw: bytes, random: Random) -> bytes:
    """Bytes with a few of them changed, cut off, or sent twice; half of the time as they are."""
    if random.random() < 0.5 or not raw:
        return raw
    place = random.randrange(len(raw))
    return random.choice(
        [
            lambda: raw[:place],
            lambda: raw[:place] + bytes([random.randrange(256)]) + raw[place + 1 :],
            lambda: raw[:place] + b"\xff\xfe" + raw[place:],
            lambda: raw + raw[:place],
            lambda: raw[place:],
            lambda: raw[:place] + struct.pack("<q", random.choice([-1, 0, 2**31, 2**62])) + raw[place + 8 :],
        ]
    )()
