"""Harm to files of every kind: each strategy draws a `Mutation` of a file that is whole.

What a JSON or TOML file says is replaced, left out, doubled or nested; of binary files the numbers that say where and
how much are overwritten; all of them are cut, filled up and garbled.
"""

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

HUGE = 50 * 2**20
"""Bytes of the longest line."""


class Mutation(NamedTuple):
    """A harmed file, and in words what was done."""

    done: str
    content: bytes


DEEP = 100_000
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "16.0", "0.5", "-0.0", "1e-300", "1e308", "1e999"),
    *("1000000000", "2147483648", "9223372036854775807", "18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000),
    *(
        "NaN",
        "-Infinity",
        '""',
        '"x"',
        '"0"',
        '"\\ud800"',
        '"\\u0000"',
        '"\\u001b[2J"',
        '"a\\r\\nb"',
        '"[/b]"',
        '"=1+1"',
    ),
    *('"../.."', '"."', '"/"', '"' + "long" * 50_000 + '"', "[]", "{}", "[[]]", "[null]", "[0]", "[1, 2, 3]", "[-1]"),
    *('{"a": 1}', '["x"]', '[{"content": 1}]', "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
)
"""JSON values that are seldom meant."""

INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    2**8,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
)


def shown(text: str, most: int = 60) -> str:
    """Return text for a message."""
    return ascii(text) if len(text) <= most else f"{text[:most]!a}... ({len(text)} characters)"


# --- any bytes ---------------------------------------------------------------------------------------


@st.composite
def of_bytes(draw: Any, content: bytes, start: int = 0) -> Mutation:
    """Harm a file without regard to what it holds; most of the time in its first bytes, or from `start` on."""
    size = len(content)
    near = st.integers(start, max(start, min(size - 1, start + 400)))
    place = min(draw(st.one_of(near, st.integers(0, max(0, size - 1)))), max(0, size - 1))
    kind = draw(
        st.sampled_from(("flip", "flip", "cut", "cut", "overwrite", "overwrite", "insert", "remove", "repeat", "whole"))
    )
    if kind == "flip":
        bit = draw(st.integers(0, 7))
        changed = bytes([content[place] ^ (1 << bit)]) if size else b"\x01"
        return Mutation(f"flip bit {bit} of byte {place}", content[:place] + changed + content[place + 1 :])
    if kind == "cut":
        return Mutation(f"cut after {place} bytes", content[:place])
    if kind == "overwrite":
        value, form = draw(st.sampled_from(INTEGERS)), draw(st.sampled_from("BIQ"))
        packed = struct.pack("<Q", value)[: struct.calcsize(form)]
        return Mutation(
            f"overwrite byte {place} and on by {packed!r}", content[:place] + packed + content[place + len(packed) :]
        )
    if kind == "insert":
        extra = draw(
            st.sampled_from((b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b"{", b'"', b"\x1b[2J", b"\x00" * 4096))
        )
        return Mutation(
            f"insert {len(extra)} bytes {extra[:8]!r} at {place}", content[:place] + extra + content[place:]
        )
    if kind == "remove":
        count = draw(st.sampled_from((1, 2, 8, 64, 1000)))
        return Mutation(f"remove {count} bytes at {place}", content[:place] + content[place + count :])
    if kind == "repeat":
        count = draw(st.sampled_from((1, 8, 64, 1000)))
        return Mutation(f"repeat {count} bytes at {place}", content[: place + count] + content[place:])
    whole = draw(
        st.sampled_from(
            (
                *(b"", b"\x00", b"null", b"[]", b"{}", b'"x"', b"0", b"\xff\xfe", b"PK\x03\x04", b"\x00" * 10_000),
                *(b"[" * DEEP, b'{"a":' * DEEP, b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n")),
                *(content + content, content[::-1], content + b"\x00", b" " + content, b"\n\n" + content),
                content.decode("latin-1").encode("utf-16"),
            )
        )
    )
    return Mutation(f"replace all by {len(whole)} bytes {whole[:12]!r}...", whole)


ENORMOUS = {
    "spaces": lambda: b" " * HUGE,
    "letters": lambda: b"a" * HUGE,
    "a JSON string": lambda: b'{"text": "' + b"a" * HUGE + b'"}',
    "a JSON list": lambda: b"[" + b"0," * (HUGE // 2) + b"0]",
    "open brackets": lambda: b"[" * HUGE,
}


def enormous() -> st.SearchStrategy[Mutation]:
    """A file of one line of 50 MB."""
    return st.sampled_from(sorted(ENORMOUS)).map(
        lambda kind: Mutation(f"one line of 50 MB of {kind}", ENORMOUS[kind]())
    )


# --- JSON --------------------------------------------------------------------------------------------


@st.composite
def of_json_value(draw: Any, base: Any) -> tuple[str, str]:
    """Harm what a JSON text says; return what was done, and the text."""
    value = json.loads(json.dumps(base))
    raw: dict[str, str] = {}

    def marked(text: str) -> str:
        marker = f"@@{len(raw)}@@"
        raw[f'"{marker}"'] = text
        return marker

    done = []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        holder, key, path = _place(draw, value)
        if holder is None:
            break
        current = holder[key]
        kind = draw(
            st.sampled_from(("set",) * 6 + ("near",) * 4 + ("delete",) * 2 + ("double", "rename", "swap", "nest"))
        )
        if kind == "set":
            text = draw(st.sampled_from(VALUES))
            holder[key] = marked(text)
            done.append(f"{path} = {shown(text)}")
        elif kind == "near":
            near = draw(st.sampled_from(_near(current)))
            holder[key] = near
            done.append(f"{path} = {shown(json.dumps(near))}")
        elif kind == "delete":
            del holder[key]
            done.append(f"delete {path}")
        elif kind == "double" and isinstance(holder, dict):
            text = draw(st.sampled_from((json.dumps(current), *VALUES[:8])))
            holder[marked(json.dumps(key))] = marked(text)
            done.append(f"{path} twice, the second {shown(text)}")
        elif kind == "rename" and isinstance(holder, dict):
            name = draw(st.sampled_from((key + "x", key.upper(), "", "\x1b[2J", "[/b]", "__class__", "../x", "=1")))
            holder[name] = holder.pop(key)
            done.append(f"{path} renamed {name!a}")
        elif kind == "swap" and len(holder) > 1:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            other = draw(st.sampled_from(keys))
            holder[key], holder[other] = holder[other], holder[key]
            done.append(f"{path} swapped with {other}")
        else:
            holder[key] = [current]
            done.append(f"{path} in a list")
    text = json.dumps(value, ensure_ascii=False)
    for marker, replacement in raw.items():
        text = text.replace(marker, replacement)
    return "; ".join(done) or "nothing", text


def _place(draw: Any, value: Any) -> tuple[Any, Any, str]:
    """Draw a place in a value: what holds it, its key, and the path for a message."""
    holder, key, path = None, None, ""
    while isinstance(value, dict | list) and value and not (holder is not None and draw(st.integers(0, 3)) == 0):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        holder, key = value, draw(st.sampled_from(keys))
        path, value = f"{path}/{key}", value[key]
    return holder, key, path


def _near(value: Any) -> list[Any]:
    """Return values close to one, of its type or another."""
    if isinstance(value, bool) or value is None:
        return [not value, str(value), int(bool(value))]
    if isinstance(value, int | float):
        found = [value + 1, value - 1, value * 2, -value, str(value), value / 2, [value], float(value)]
        return [*found, value // 2 if isinstance(value, int) else value * (1 + 1e-9)]
    if isinstance(value, str):
        return [
            value + " ",
            value.upper(),
            value[: len(value) // 2],
            value * 2,
            value + "\u0000",
            [value],
            f"[red]{value}",
        ]
    if isinstance(value, list):
        return [value * 2, value[:-1], value[::-1], [*value, None], {str(i): each for i, each in enumerate(value)}]
    return [list(value.items()), list(value), {**value, "extra": 1}, str(value)]


def of_json(content: bytes) -> st.SearchStrategy[Mutation]:
    """Harm a JSON file: what it says most of the time, its bytes else."""
    said = of_json_value(json.loads(content)).map(lambda each: Mutation(each[0], each[1].encode()))
    return st.one_of(*[said] * 7, *[of_bytes(content)] * 2, st.one_of(*[said] * 4, enormous()))


@st.composite
def of_json_lines(draw: Any, content: bytes) -> Mutation:
    """Harm a file of JSON lines: a line's content, its bytes, or the order of lines."""
    lines = content.split(b"\n")
    place = draw(st.integers(0, max(0, len(lines) - 2)))
    kind = draw(st.sampled_from(("said",) * 6 + ("bytes", "bytes", "cut", "repeat", "remove", "swap", "long", "open")))
    if kind == "said":
        done, text = draw(of_json_value(json.loads(lines[place])))
        lines[place] = text.encode()
    elif kind == "bytes":
        done, content = draw(of_bytes(content))
        return Mutation(done, content)
    elif kind == "cut":
        size = draw(st.integers(0, len(lines[place])))
        done, lines[place] = f"cut after {size} bytes", lines[place][:size]
    elif kind == "repeat":
        count = draw(st.sampled_from((2, 3, 1000)))
        done, lines[place : place + 1] = f"repeat {count} times", [lines[place]] * count
    elif kind == "remove":
        done, lines[place : place + 1] = "remove", []
    elif kind == "swap":
        done, lines[0], lines[place] = "swap with line 1", lines[place], lines[0]
    elif kind == "long" and draw(st.integers(0, 3)) == 0:
        harmed = draw(enormous())
        done, lines[place] = harmed.done, harmed.content
    else:
        done, lines[place] = "open brackets", b"[" * DEEP
    return Mutation(f"line {place + 1}: {done}", b"\n".join(lines))


# --- safetensors, GGUF, npz --------------------------------------------------------------------------


@st.composite
def of_safetensors(draw: Any, content: bytes) -> Mutation:
    """Harm a safetensors file: its header, the length of that, or where the data end; weights stay as they are."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = draw(
        st.sampled_from(("said",) * 6 + ("size", "header", "header", "data", "data", "offset", "offset", "deep"))
    )
    if kind == "size":
        value = draw(
            st.sampled_from((*INTEGERS, size - 1, size + 1, size + 8, size - 8, len(content), len(content) - 8))
        )
        return Mutation(f"length of the header = {value}", struct.pack("<Q", value) + header + data)
    if kind == "data":
        count = draw(st.sampled_from((1, 4, 64, len(data) // 2, len(data))))
        longer = draw(st.booleans())
        changed = data + b"\x00" * count if longer else data[:-count]
        return Mutation(f"data {'longer' if longer else 'shorter'} by {count} bytes", content[: 8 + size] + changed)
    if kind == "deep":
        done, new = "header of brackets", draw(st.sampled_from((b"[" * DEEP, b'{"a":' * DEEP, b" " * DEEP)))
    elif kind == "header":
        done, new = draw(of_bytes(header))
        done = f"header: {done}"
    elif kind == "offset":
        said = json.loads(header)
        name = draw(st.sampled_from([name for name in said if name != "__metadata__"]))
        which, value = draw(st.integers(0, 1)), draw(st.sampled_from((*INTEGERS, -1, -8)))
        said[name]["data_offsets"][which] = value
        done, new = f"offset {which} of {name} = {value}", json.dumps(said).encode()
    else:
        done, text = draw(of_json_value(json.loads(header)))
        new = text.encode()
    return Mutation(done, struct.pack("<Q", len(new)) + new + data)


@st.composite
def of_gguf(draw: Any, content: bytes, places: Sequence[tuple[str, int, int]], end: int) -> Mutation:
    """Harm a GGUF file: one of the numbers that say what lies where, or bytes before its tensors' data."""
    kind = draw(st.sampled_from(("number",) * 8 + ("bytes", "bytes", "cut", "tail")))
    if kind == "cut":
        size = draw(st.integers(0, len(content)))
        return Mutation(f"cut after {size} bytes", content[:size])
    if kind == "tail":
        return Mutation("garbage at the end", content + b"\xff" * draw(st.sampled_from((1, 32, 100_000))))
    if kind == "bytes":
        done, head = draw(of_bytes(content[:end]))
        return Mutation(done, head + content[end:])
    names = sorted({_kind(name) for name, _, _ in places})
    wanted = draw(st.sampled_from(names))
    name, place, size = draw(st.sampled_from([each for each in places if _kind(each[0]) == wanted]))
    mask = (1 << 8 * size) - 1
    now = int.from_bytes(content[place : place + size], "little")
    value = draw(st.sampled_from((*INTEGERS, now + 1, now - 1, now * 2, now // 2, now + 32, now - 32))) & mask
    return Mutation(
        f"{name} (bytes {place} to {place + size}): {now} -> {value}",
        content[:place] + value.to_bytes(size, "little") + content[place + size :],
    )


def _kind(name: str) -> str:
    """Return what a number of a GGUF file is, so that each kind is drawn as often, whatever the file has of it."""
    return re.sub(r"blk\.\d+", "blk", name) if not name.startswith("length of tokenizer.ggml") else "length of a token"


HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': SHAPE, }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': SHAPE, }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': SHAPE, }",
    "{'descr': 'DESCR', 'fortran_order': True, 'shape': SHAPE, }",
    "{'descr': 'DESCR', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': 'DESCR', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': 'DESCR', 'fortran_order': False, 'shape': (), }",
    "{'descr': 'DESCR', 'fortran_order': False, 'shape': SHAPE[::-1], }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': SHAPE, }",
    "{'descr': '<U99', 'fortran_order': False, 'shape': SHAPE, }",
    "{'descr': 'DESCR', 'shape': SHAPE, }",
    "__import__('os').abort()",
    "(" * 5000 + ")" * 5000,
    "",
)


@st.composite
def of_npz(draw: Any, content: bytes) -> Mutation:
    """Harm a file of numpy arrays: its archive, the header of an array, or which arrays there are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = draw(st.integers(0, len(members) - 1))
    name, data = members[place]
    kind = draw(
        st.sampled_from(("bytes",) * 4 + ("header",) * 5 + ("remove", "rename", "double", "data", "bomb", "swap"))
    )
    compression, done = zipfile.ZIP_STORED, f"{name}: {kind}"
    if kind == "bytes":
        harmed = draw(of_bytes(content))
        return harmed._replace(done=f"archive: {harmed.done}")
    if kind == "header":
        text = draw(st.sampled_from(HEADERS))
        size = struct.unpack("<H", data[8:10])[0]
        old = data[10 : 10 + size].decode()
        match = re.search(r"'descr': '(.*?)'.*'shape': (\(.*?\))", old)
        assert match is not None
        text = (
            text.replace("DESCR", match[1])
            .replace("SHAPE[::-1]", str(tuple(reversed(eval(match[2])))))
            .replace("SHAPE", match[2])
        )
        members[place] = (name, data[:8] + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data[10 + size :])
        done = f"{name}: header {shown(text, 90)}"
    elif kind == "remove":
        del members[place]
    elif kind == "rename":
        new = draw(
            st.sampled_from(
                ("x.npy", "/x", "../../x.npy", "a/b/c/d.npy", name.upper(), "\x1b[2J.npy", "[/b].npy", name[:-4])
            )
        )
        members[place], done = (new, data), f"{name} renamed {new!a}"
    elif kind == "double":
        members.append(members[0])
    elif kind == "data":
        size = draw(st.integers(0, len(data)))
        members[place], done = (name, data[:size]), f"{name}: cut after {size} bytes"
    elif kind == "bomb":
        compression = zipfile.ZIP_DEFLATED
        shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({3 * 2**28},), }}\n".encode()
        members[place] = (name, data[:8] + struct.pack("<H", len(shape)) + shape + b"\x00" * (64 * 2**20))
    elif len(members) > 1:
        other = draw(st.integers(0, len(members) - 1))
        members[place], members[other] = (name, members[other][1]), (members[other][0], data)
        done = f"{name} swapped with {members[other][0]}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for member, each in members:
            info = zipfile.ZipInfo(member)
            info.compress_type = compression
            archive.writestr(info, each)
    return Mutation(done, buffer.getvalue())


# --- texts -------------------------------------------------------------------------------------------

TOML = (
    *('""', '"5"', '"-5%"', '"5%%"', '"1e999%"', '"nan%"', '"5 %"', '"0%"', '"1e-9%"', '"1000000000000%"', '"x"'),
    *(
        "0",
        "5",
        "-1",
        "5.0",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 400,
        "9" * 5000,
        "0x10",
        "0b1",
        "true",
        "false",
        "[]",
    ),
    *("[1]", '["x"]', '["*"]', '[""]', "[[]]", "{}", "{a = 1}", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z"),
    *('"\\u0000"', '"\\u001b[2J"', '"[/b]"', '"""a\nb"""', "'''x'''", '"\\ud800"', '"300MiB"', '"1e400GiB"', '"0B"'),
    *("[" * 5000 + "]" * 5000, "{a=" * 5000 + "1" + "}" * 5000, '"' + "long" * 50_000 + '"', "", "=", '"open'),
)


@st.composite
def of_toml(draw: Any, content: bytes) -> Mutation:
    """Harm a TOML file: a value, a key, a line, or its bytes."""
    lines = content.decode().split("\n")
    keyed = [number for number, line in enumerate(lines) if re.match(r"\w+ *=", line)]
    place = draw(st.sampled_from(keyed))
    key, _, value = lines[place].partition("=")
    kind = draw(st.sampled_from(("value",) * 8 + ("key", "double", "remove", "line", "bytes", "bytes")))
    if kind == "bytes":
        return draw(of_bytes(content))
    if kind == "value":
        new = draw(st.sampled_from(TOML))
        done, lines[place] = f"{key.strip()} = {shown(new)}", f"{key}= {new}"
    elif kind == "key":
        new = draw(
            st.sampled_from(
                ("x", '""', '"\\u001b[2J"', '"[/b]"', "a.b", f"{key.strip()}.b", key.strip().upper(), "a-b")
            )
        )
        done, lines[place] = f"{key.strip()} renamed {new!a}", f"{new} ={value}"
    elif kind == "double":
        done = f"{key.strip()} twice"
        lines.insert(place, lines[place])
    elif kind == "remove":
        done = f"without {key.strip()}"
        del lines[place]
    else:
        extra = draw(
            st.sampled_from(
                (
                    "[x]",
                    "[[[",
                    "[table]",
                    "\x00",
                    "a.b.c = 1",
                    "x" * 100_000,
                    "a = 1 b = 2",
                    "." * 5000 + "= 1",
                    "a." * 20_000 + "a = 1",
                )
            )
        )
        done = f"line {shown(extra)} before {key.strip()}"
        lines.insert(place, extra)
    return Mutation(done, "\n".join(lines).encode())


@st.composite
def of_text(draw: Any, content: bytes) -> Mutation:
    """Harm a plain text: its bytes, or one line that is very long."""
    return draw(st.one_of(*[of_bytes(content)] * 9, enormous()))


TEMPLATE = (
    *("{{", "{%", "{% for", "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages[7] }}", "{{ messages | tojson }}"),
    *("{{ raise_exception('[/b]') }}", "{{ ''.__class__.__mro__ }}", "{{ '\\ud800' }}", "{{ 'a' * 10 ** 11 }}"),
    *("{% for i in range(10 ** 9) %}x{% endfor %}", "{{ 9 ** (9 ** 9) }}", "{{ '%s' | format(messages) }}", "\x1b[2J"),
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{{ range(10**10) | list }}",
    ),
    *(
        "{% set ns = namespace(x=1) %}",
        "{{ messages | sum }}",
        "{{ messages.append }}",
        "{# open",
        "{{ 'x'.format_map({}) }}",
    ),
    *(
        "{{ lipsum(n=100000) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% generation %}x{% endgeneration %}",
        "{{" * 5000,
    ),
    *(
        "(" * 5000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ bos_token }}",
        "{{ strftime_now('%Y') }}",
        "\x00",
        "é" * 1000,
    ),
    *(
        "{% if true %}" * 1000,
        "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
        "{{ messages[0]['content'] * 10 ** 10 }}",
    ),
    *(
        "{% break %}",
        "{{ 'x' | center(10 ** 11) }}",
        "{{ dict(a=1) | dictsort | first | int }}",
        "{{ [[1]] | tojson(indent=10**9) }}",
    ),
)


@st.composite
def of_template(draw: Any, content: bytes) -> Mutation:
    """Harm a chat template: a piece of another inside it, or its bytes."""
    kind = draw(st.sampled_from(("piece", "piece", "piece", "bytes", "alone")))
    if kind == "bytes":
        return draw(of_bytes(content))
    piece = draw(st.sampled_from(TEMPLATE))
    place = 0 if kind == "alone" else draw(st.integers(0, len(content)))
    rest = b"" if kind == "alone" else content
    return Mutation(
        f"{shown(piece)} at {place} of {len(rest)}", rest[:place] + piece.encode(errors="surrogatepass") + rest[place:]
    )


PYTHON = (
    *(
        "None",
        "True",
        "0",
        "1",
        "-1",
        "2.5",
        "10**30",
        "10**5000",
        "1e400",
        "float('nan')",
        '""',
        '"x"',
        '"\\ud800"',
        '"\\x00"',
    ),
    *(
        '"\\x1b[2J"',
        '"[/b]"',
        '"../x"',
        '"/"',
        '"a" * 10**5',
        "()",
        '("x",)',
        "(1,)",
        "[1]",
        '["wanda", "wanda"]',
        '("wanda", 1)',
    ),
    *(
        "{}",
        '{"a": 1}',
        "object()",
        "lambda: 0",
        "int",
        "b'x'",
        "...",
        '("wanda(x=1)",)',
        "CalibrationConfig",
        "ModelConfig(name='x')",
    ),
    *(
        "ScoreConfig()",
        "range(10**12)",
        "(None,)",
        "((),)",
        '("a=text:a.txt", "a=text:a.txt")',
        "iter(())",
        "set()",
        "1j",
    ),
)
STATEMENTS = (
    *(
        "1 / 0",
        "raise RecursionError",
        "import nothing_here",
        "exit(3)",
        "raise SystemExit('x')",
    ),
    *(
        "def f(): f()\nf()",
        "raise BaseException('x')",
        "CONFIG = 1",
        "del CONFIG",
        "CONFIG.name = 'x'",
        "(" * 5000,
        "x = '\ud800'",
    ),
    *(
        "\x00",
        "if True:",
        "raise MemoryError",
        "raise ValueError('[/b]\\n\\x1b[2J')",
        "raise OSError",
        "assert False",
        "x" * 200_000,
    ),
    *(
        "raise ValueError(10**5000)",
        "print('\\x1b[2J')",
        "CONFIG = type(CONFIG)",
        "x = " + "-" * 100_000 + "1",
        "raise Exception('\\ud800')",
    ),
)


@st.composite
def of_python(draw: Any, content: bytes) -> Mutation:
    """Harm a CONFIG.py: a value in it, or a statement after it."""
    text = content.decode()
    kind = draw(st.sampled_from(("value",) * 6 + ("statement", "statement", "bytes")))
    if kind == "bytes":
        return draw(of_bytes(content))
    if kind == "statement":
        statement = draw(st.sampled_from(STATEMENTS))
        return Mutation(f"after it: {shown(statement)}", f"{text}\n{statement}\n".encode(errors="surrogatepass"))
    match = draw(st.sampled_from(list(re.finditer(r"(\w+)=((?:[^=\n(]|\([^()\n]*\))+?),\n", text))))
    value = draw(st.sampled_from(PYTHON))
    return Mutation(f"{match[1]} = {shown(value)}", (text[: match.start(2)] + value + text[match.end(2) :]).encode())


# --- words -------------------------------------------------------------------------------------------

WORDS = (
    *(
        "",
        "-",
        "--",
        "---",
        "-1",
        "0",
        "1",
        "2",
        "7",
        "1.5",
        "1e9",
        "10000000000",
        "9" * 400,
        "9" * 5000,
        "nan",
        "inf",
        "True",
    ),
    *(
        "x",
        "\x1b[2J",
        "[/b]",
        "a\nb",
        "é",
        "\udc80",
        "a" * 100_000,
        "../x",
        ".",
        "/",
        "/dev/null",
        "=1",
        "@x",
        "--help=1",
    ),
    *("--windows", "--widnows", "--windows=2", "--json", "--dtype", "float16", "text:nothing.txt", "jsonl:lines.jsonl"),
    *(
        "jsonl:lines.jsonl#text",
        "builtin:x",
        "x:y",
        ":",
        "text:",
        "tfds:x@y#z",
        "tiny",
        "tinny",
        "x/y",
        "--sources",
        "--mesh.fsdp",
    ),
    *(
        "--mesh.data",
        "--limit",
        "--tasks",
        "tasks.jsonl",
        "--task-path",
        "--models",
        "--overwrite",
        "--distributed",
        "--windows 2",
    ),
)


@st.composite
def of_words(draw: Any, words: Sequence[str]) -> tuple[str, list[str]]:
    """Harm the words of a command; return what was done, and the words."""
    found, done = list(words), []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        place = draw(st.integers(0, len(found) - 1))
        kind = draw(st.sampled_from(("replace",) * 5 + ("insert", "remove", "typo", "double", "swap")))
        if kind == "replace":
            word = draw(st.sampled_from(WORDS))
            done.append(f"{found[place]} replaced by {shown(word)}")
            found[place] = word
        elif kind == "insert":
            word = draw(st.sampled_from(WORDS))
            done.append(f"{shown(word)} inserted before {found[place]}")
            found.insert(place, word)
        elif kind == "remove":
            done.append(f"without {found[place]}")
            del found[place]
        elif kind == "typo":
            word = found[place]
            found[place] = word[:1] + word[2:] + word[1:2]
            done.append(f"{word} misspelled {found[place]}")
        elif kind == "double":
            done.append(f"{found[place]} twice")
            found.insert(place, found[place])
        else:
            other = draw(st.integers(0, len(found) - 1))
            done.append(f"{found[place]} swapped with {found[other]}")
            found[place], found[other] = found[other], found[place]
        if not found:
            break
    return "; ".join(done), found


NAMES = (
    *(
        "wanda",
        "gate_taylor",
        "gate_taylor_signed",
        "gate_fisher",
        "gate_hessian",
        "fluctuation",
        "activation_frequency",
    ),
    *(
        "random",
        "magnitude",
        "taylor_element",
        "taylor_vector",
        "fisher",
        "block_influence",
        "saap",
        "wnada",
        "WANDA",
        "",
    ),
    *(
        "wanda+gate_taylor",
        "wanda/gate_taylor",
        "wanda+",
        "/wanda",
        "wanda+wanda",
        "a+b",
        "wanda/gate_taylor+wanda",
        "__import__",
    ),
)
OPTIONS = (
    "standardize",
    "multiple",
    "reduction",
    "seed",
    "probes",
    "x",
    "self",
    "__class__",
    "normalize",
    "**",
    "*",
    "norm",
)
LITERALS = (
    *(
        "True",
        "None",
        "0",
        "1",
        "-1",
        "1.0",
        "2",
        "1e400",
        "10**3",
        "9" * 400,
        "9" * 5000,
        "'x'",
        "'max'",
        "'\\ud800'",
        "'[/b]'",
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        "{[]}",
        "{1: []}",
        "{[]: 1}",
        "()",
        "lambda: 0",
        "x",
        "1j",
        "b'x'",
        "...",
        "(" * 300 + ")" * 300,
    ),
    *(
        "(" * 5000 + ")" * 5000,
        "-" * 50_000 + "1",
        "'" + "a" * 100_000 + "'",
        "f'{1}'",
        "'\\x1b[2J'",
        "nan",
        "float('nan')",
        "{**1}",
    ),
)


@st.composite
def of_spec(draw: Any) -> str:
    """Return how somebody might name an estimator."""
    name = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(("call",) * 6 + ("name", "raw", "harm")))
    if kind == "name":
        return name
    if kind == "raw":
        return draw(st.sampled_from(LITERALS))
    count = draw(st.integers(0, 2))
    chosen = [f"{draw(st.sampled_from(OPTIONS))}={draw(st.sampled_from(LITERALS))}" for _ in range(count)]
    text = f"{name}({', '.join(chosen)})"
    if kind == "harm":
        place = draw(st.integers(0, len(text)))
        return (
            text[:place]
            + draw(st.sampled_from(("\x00", "(", "\n", "\x1b[2J", ",", "=", "\udc80", " " * 1000, "#")))
            + text[place:]
        )
    return text
