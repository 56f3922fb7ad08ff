# SPDX-License-Identifier: Apache-2.0
"""Damage to files: of bytes, whatever they mean, and of what formats say in their headers, so that a mutant gets past
the first check. Each takes a file's bytes and a ``random.Random``, and returns other bytes."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

#: Numbers at which something ends.
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 1023, 32767, 32768, 65535, 65536, 100_000, 2**24, 2**28]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, -(2**31), -(2**63)]

#: Values of any kind, for what is parsed as text.
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e308, -1e308, float("inf"), float("nan")]
VALUES += [2**31, 2**63, 10**30, 10**9, 10**6, "", "x", "1e5", "\ud800", "\0", "../../etc/passwd", "A" * 1000]
VALUES += [[], [1], [0], [-1], [1, 2, 3], [[1]], [None], ["a"], [10**6], [1] * 1000, [1e9, 1e9], {}, {"a": 1}]

WORDS = ["nan", "-nan", "inf", "1e400", "0x10", "", " ", "-", "1,2", "1 2 3 4 5", "a" * 5000, "%s%n", "\x1b[2J", "\xe9"]


def any_bytes(data: bytes, rng: random.Random, header: int = 0) -> bytes:
    """Flips, cuts, repeats, numbers; seven of ten in the first ``header`` bytes, where there is one."""
    changed, size = bytearray(data), len(data)
    if not size:
        return b"x"

    def place() -> int:
        return rng.randrange(min(header, size) if header and rng.random() < 0.7 else size)

    kind = rng.choice(["flip"] * 3 + ["cut", "zero", "ones", "number", "number", "repeat", "delete", "swap", "digits"])
    at, length = place(), rng.choice([1, 2, 4, 8, 16, 64, 256])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
            changed[place()] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.choice([at, size - 1, rng.randrange(size)]) :]
    elif kind in ("zero", "ones"):
        part = slice(at, min(at + length, size))
        changed[part] = (b"\0" if kind == "zero" else b"\xff") * len(changed[part])
    elif kind == "number":
        width = rng.choice([1, 2, 4, 8])
        value = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
        part = slice(at, min(at + width, size))
        changed[part] = value.to_bytes(width, rng.choice(["little", "big"]))[: len(changed[part])]  # type: ignore[arg-type]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + length]
    elif kind == "delete":
        del changed[at : at + length]
    elif kind == "swap":
        other, length = place(), rng.choice([1, 2, 4, 8])
        a, b = bytes(changed[at : at + length]), bytes(changed[other : other + length])
        changed[at : at + len(b)], changed[other : other + len(a)] = b, a
    else:
        found = list(re.finditer(rb"\d+", changed[: header or size]))
        if found:
            number = rng.choice(found)
            changed[number.start() : number.end()] = str(rng.choice(NUMBERS)).encode()
    return bytes(changed)


def header_of(length: int) -> Mutator:
    """``any_bytes``, mostly in a header of that length."""
    return lambda data, rng: any_bytes(data, rng, length)


def fields(*places: tuple[int, str]) -> Mutator:
    """Numbers at known places, (offset, struct format with its order of bytes), get values at which something ends."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 3])):
            at, form = rng.choice(places)
            if at + struct.calcsize(form) > len(changed):
                continue
            if form[-1] in "fd":
                value: Any = rng.choice([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"), 0.5, 352.5])
            else:
                bits = 8 * struct.calcsize(form)
                value = rng.choice([*NUMBERS, rng.randrange(20)]) & ((1 << bits) - 1)
                if form[-1].islower() and value >= 1 << (bits - 1):
                    value -= 1 << bits
            struct.pack_into(form, changed, at, value)
        return bytes(changed)

    return mutate


def inside_gzip(mutator: Mutator) -> Mutator:
    """What is packed is mutated; sound files of other content, bombs among them."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        content = gzip.decompress(data)
        if rng.random() < 0.05:
            return gzip.compress(content + bytes(2**27), 1, mtime=0)
        return gzip.compress(mutator(content, rng), mtime=0)

    return mutate


def text_fields(separator: str, extra: tuple[str, ...]) -> Mutator:
    """Lines KEY ``separator`` VALUE at the beginning: taken away, doubled, exchanged, given other values, added to."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        text = data.decode("latin-1")
        lines = re.findall(r"[^\n]*\n", text[:4096])
        count = next((i for i, one in enumerate(lines) if i and separator.strip() not in one), len(lines))
        head, rest = lines[:count], text[sum(map(len, lines[:count])) :]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            at = rng.randrange(len(head)) if head else 0
            kind = rng.choice(["number", "number", "number", "value", "drop", "double", "swap", "add", "add"])
            if kind == "add":
                head.insert(at + 1, rng.choice(extra) + "\n")
            elif not head:
                continue
            elif kind == "drop":
                del head[at]
            elif kind == "double":
                head.insert(rng.randrange(len(head)), head[at])
            elif kind == "swap":
                other = rng.randrange(len(head))
                head[at], head[other] = head[other], head[at]
            elif kind == "value":
                key, sign, _ = head[at].partition(separator.strip())
                head[at] = f"{key}{sign} {rng.choice([*WORDS, *map(str, NUMBERS)])}\n"
            else:
                key, sign, value = head[at].partition(separator.strip())
                found = list(re.finditer(r"-?\d+(\.\d+)?", value))
                if found:
                    number = rng.choice(found)
                    new = str(rng.choice([*NUMBERS, 0.5, 1e-30, 1e30, "nan", "inf"]))
                    head[at] = key + sign + value[: number.start()] + new + value[number.end() :]
        return ("".join(head) + rest).encode("latin-1", "replace")

    return mutate


def any_json(value: Any, rng: random.Random) -> Any:
    """A parsed document with a node or two replaced, taken away or added."""
    value = copy.deepcopy(value)
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places: list[tuple[Any, Any]] = []

        def collect(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                collect(node[key])

        collect(value)
        if not places:
            return rng.choice(VALUES)
        parent, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif kind < 0.22 and isinstance(parent, dict):
            parent[f"extra_{rng.randrange(9)}"] = rng.choice(VALUES)
        elif kind < 0.4 and isinstance(parent[key], (int, float)):
            parent[key] = rng.choice([-parent[key], parent[key] + 1, float(parent[key]), str(parent[key])])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def json_text(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(any_json(json.loads(data), rng), indent=rng.choice([None, 1]))
    if rng.random() < 0.05:
        return b"[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def yaml_text(data: bytes, rng: random.Random) -> bytes:
    import yaml

    if rng.random() < 0.2:
        return data + rng.choice(
            [
                b"a: &a [1, 1]\nb: &b [*a, *a]\nflip: *b\n",
                b"flip: !!python/object/apply:os.getcwd []\n",
                b"steps: 2026-13-45\n",
                b"? [1, 2]\n: 3\n",
                b"\tsteps: 1\n",
                b"steps: 0o17\nseed: 1_0\n",
                b"seed: " + b"9" * 5000 + b"\n",
                b"seed: !!int x\n",
                b"? {}\n: 1\n",
                b"<<: 3\n",
                b"seed: 1:60:60\n",
                b"output: " + b"[" * 2000 + b"\n",
            ]
        )
    value = any_json(yaml.safe_load(data), rng)
    return yaml.safe_dump(value, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def xml_elements(data: bytes, rng: random.Random) -> bytes:
    """Elements without children taken away, doubled, exchanged, given other texts; or what no reading declares."""
    if rng.random() < 0.1:
        bombs = [b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>', b"<!DOCTYPE x SYSTEM 'file:///etc/passwd'>"]
        head, _, rest = data.partition(b"?>")
        return rng.choice([head + b"?>" + rng.choice(bombs) + rest, b"<a>" * 100_000, data + data])
    text = data.decode("latin-1")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(re.finditer(r"<(\w+)>([^<>]*)</\1>", text))
        one = rng.choice(found)
        kind = rng.choice(["text", "text", "text", "number", "number", "drop", "double", "swap", "name"])
        new = ""
        if kind in ("text", "number"):
            value = rng.choice([*map(str, NUMBERS), "0.5", "nan", "1e30"] if kind == "number" else [*WORDS, "FALSE"])
            new = f"<{one[1]}>{value}</{one[1]}>"
        elif kind == "double":
            new = one[0] * rng.choice([2, 2, 2, 5000])
        elif kind == "swap":
            new = rng.choice(found)[0]
        elif kind == "name":
            new = one[0].replace(one[1], rng.choice(found)[1])
        text = text[: one.start()] + new + text[one.end() :]
    return text.encode("latin-1", "replace")


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON in front, and the description in it, which loses its checksum, as files of before had none."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") or {}
    if rng.random() < 0.2 or not metadata:
        header = any_json(header, rng)
    else:
        ((key, text),) = metadata.items()
        description = json.loads(text)
        if rng.random() < 0.9:
            description.pop("sha256", None)
        metadata[key] = json.dumps(any_json(description, rng))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def zip_members(mutator: Mutator) -> Mutator:
    """A member is mutated, and the archive is sound again; now and then it is packed, and a member is huge."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = {name: old.read(name) for name in old.namelist()}
        name = rng.choice([*members])
        if rng.random() < 0.05:
            members[name] += bytes(2**27)
        else:
            members[name] = mutator(members[name], rng)
        if rng.random() < 0.1:
            del members[rng.choice([*members])]
        new = io.BytesIO()
        with zipfile.ZipFile(new, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=archive.compression)
        return new.getvalue()

    return mutate


def npy_header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<H", data[8:10])
    text, rest = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    found = rng.choice(list(re.finditer(r"'[^']*'|\d+|True|False", text)))
    new = str(
        rng.choice([*NUMBERS, "None", "'O'", "'<f8'", "'|V8'", "[('a', '<i4')]", "1.5", "'<M8[s]'", "'<c8'", "-1"])
    )
    text = text[: found.start()] + new + text[found.end() :]
    return data[:8] + struct.pack("<H", len(text)) + text.encode("latin-1") + rest


def _inflated(data: bytes) -> bytes:
    """What zlib makes of data, or something else where an earlier change has damaged them."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj().decompress(data) or b"x"
    return b"x"


def png_chunks(data: bytes, rng: random.Random) -> bytes:
    """Chunks with sound checksums: other sizes, depths and colours; missing, doubled, unpacked and mutated pixels."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(chunks))
        name, content = chunks[at]
        kind = rng.choice(["bytes", "bytes", "header", "header", "drop", "double", "pixels", "add"])
        if kind == "bytes" and content:
            chunks[at] = (name, any_bytes(content, rng))
        elif kind == "header":
            header = fields((0, ">I"), (4, ">I"), *((k, ">B") for k in range(8, 13)))
            chunks[0] = (chunks[0][0], header(chunks[0][1], rng))
        elif kind == "drop" and len(chunks) > 1:
            del chunks[at]
        elif kind == "double":
            chunks.insert(at, chunks[at])
        elif kind == "pixels":
            chunks = [
                (n, zlib.compress(any_bytes(_inflated(c), rng)) if n == b"IDAT" else c)
                for n, c in chunks
                if n != b"IDAT" or c[:1] == b"\x78"
            ] or chunks
        else:
            bomb = zlib.compress(bytes(2**24))
            extra = [(b"tRNS", b"\0\1"), (b"PLTE", bytes(9)), (b"eXIf", b"II*\0" + bytes(9))]
            extra += [(b"acTL", b"\0\0\0\2" + bytes(4)), (b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)]
            chunks.insert(min(1, len(chunks)), rng.choice(extra))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def jpeg_segments(data: bytes, rng: random.Random) -> bytes:
    """Segments before the pixels, with lengths that fit."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    place = rng.randrange(len(segments))
    kind = rng.choice(["bytes", "bytes", "bytes", "drop", "double", "marker"])
    marker, content = segments[place]
    if kind == "bytes":
        segments[place] = (marker, any_bytes(content, rng))
    elif kind == "drop":
        del segments[place]
    elif kind == "double":
        segments.insert(place, (marker, content))
    else:
        segments[place] = (rng.randrange(0xC0, 0xFF), content)
    return data[:2] + b"".join(bytes([0xFF, m]) + struct.pack(">H", len(c) + 2) + c for m, c in segments) + data[at:]


def tiff_entries(data: bytes, rng: random.Random) -> bytes:
    """Entries of the first directory: their tags, types, counts and values."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43 or data[3] == 43
    start = struct.unpack(f"{order}{'Q' if big else 'I'}", data[8:16] if big else data[4:8])[0]
    count = struct.unpack(f"{order}{'Q' if big else 'H'}", data[start : start + (8 if big else 2)])[0]
    width, first = (20, start + 8) if big else (12, start + 2)
    places = []
    for entry in range(min(count, 64)):
        at = first + entry * width
        places += [(at, f"{order}H"), (at + 2, f"{order}H")]
        places += (
            [(at + 4, f"{order}Q"), (at + 12, f"{order}Q")] if big else [(at + 4, f"{order}I"), (at + 8, f"{order}I")]
        )
        places += [(at + width - (8 if big else 4), f"{order}H")] * 2
    return fields(*places)(data, rng)
