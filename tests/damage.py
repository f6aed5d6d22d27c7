"""Damaged input files: valid rows in which something was changed, and bytes in which something was.

    damaged(rows)      a Hypothesis strategy: the bytes of a JSONL file
    damaged_json(row)  the same for one JSON document

A change knows the structure: it goes to some place in some row and puts a value of another type, a
number that no float holds, or half a surrogate pair there; or it removes, doubles or renames what
stands there. Then, now and then, the bytes are damaged too: cut off, flipped, in another encoding,
compressed.
"""

import copy
import gzip
import json

from hypothesis import strategies as st


class Raw(str):
    """Text that is written into the file as it stands."""


# Values that somebody's file has had, or might have.
HOSTILE = [
    None,
    True,
    False,
    "",
    " ",
    "x",
    "None",
    "a\u0000b",
    "\U0001f351 größer",
    "<|im_start|>system",
    "<|im_end|>",
    "{{ bos_token }}",
    "y" * 3000,
    0,
    1,
    -1,
    6.9,
    -0.0,
    306,
    307,
    2**31,
    2**63,
    10**30,
    1e101,
    1e308,
    Raw("1E400"),
    Raw("-1e400"),
    Raw("NaN"),
    Raw("Infinity"),
    Raw("9" * 5000),
    Raw("1" + "0" * 400),
    Raw('"\\ud800"'),
    Raw('"\\udc00 low"'),
    Raw("[" * 150 + "]" * 150),
    Raw("[" * 5000 + "]" * 5000),
    Raw('{"a":' * 3000 + "1" + "}" * 3000),
    [],
    [[]],
    [0],
    [6.9],
    [True],
    ["7"],
    [307],
    [-1],
    [None],
    list(range(6, 300)),
    {},
    {"a": 1},
    {"role": "user", "content": "x"},
    [{"role": "user", "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}],
    [{"role": 7, "content": "x"}],
    [{"content": "x"}],
]
NEW_KEYS = ["tools", "chosen", "iteration", "candidates", "meta", "prompt_token_ids", "note", ""]


def to_json(value) -> str:
    """JSON, but for what is Raw, which may be none."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {to_json(element)}" for key, element in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# ---- one change --------------------------------------------------------------------------------


def pick(draw, options):
    return options[draw(st.integers(0, len(options) - 1))]


def keys_of(container) -> list:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def change(draw, root: list) -> None:
    """Change something in `root`, a list of rows, in place."""
    container = root
    while True:  # go down, to some depth
        keys = keys_of(container)
        if not keys:
            break
        key = pick(draw, keys)
        inside = container[key]
        if not isinstance(inside, (dict, list)) or Raw in map(type, [inside]):
            break
        if draw(st.integers(0, 3)) == 0:
            break
        container = inside
    if not keys_of(container):
        put(container, copy.deepcopy(pick(draw, HOSTILE)), pick(draw, NEW_KEYS))
        return

    kind = draw(st.sampled_from(("set", "set", "set", "remove", "double", "rename", "add")))
    if kind == "set":
        container[key] = copy.deepcopy(pick(draw, HOSTILE))
    elif kind == "remove":
        del container[key]
    elif kind == "double":
        put(container, copy.deepcopy(container[key]), f"{key} again")
    elif kind == "rename" and isinstance(container, dict):
        container[pick(draw, NEW_KEYS)] = container.pop(key)
    else:
        put(container, copy.deepcopy(pick(draw, HOSTILE)), pick(draw, NEW_KEYS))


def put(container, value, key: str) -> None:
    if isinstance(container, dict):
        container[key] = value
    else:
        container.append(value)


# ---- bytes -------------------------------------------------------------------------------------


def damage(draw, content: bytes) -> bytes:
    """`content`, most often as it is."""
    kind = draw(st.integers(0, 30))
    if kind > 9 or not content:
        return content
    place = draw(st.integers(0, len(content) - 1))
    if kind == 0:
        return content[:place]
    if kind == 1:
        flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
    if kind == 3:
        return content[:place] + content[place + draw(st.integers(1, 50)) :]
    if kind == 4:
        return content.decode(errors="replace").encode("utf-16")
    if kind == 5:
        return content.decode(errors="replace").encode("latin-1", errors="replace")
    if kind == 6:
        return gzip.compress(content)
    if kind == 7:
        return b"\xef\xbb\xbf" + content
    if kind == 8:
        return content.replace(b"\n", b"\r\n")
    return content + b"\n"


# ---- strategies --------------------------------------------------------------------------------


@st.composite
def damaged(draw, rows: list[dict]) -> bytes:
    """The bytes of a JSONL file that began as `rows`."""
    changed = copy.deepcopy(rows)
    for _ in range(draw(st.integers(0, 3))):
        change(draw, changed)
    text = "".join(to_json(row) + "\n" for row in changed)
    return damage(draw, text.encode(errors="surrogatepass"))


@st.composite
def damaged_json(draw, document) -> bytes:
    """The bytes of a JSON file that began as `document`."""
    changed = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(0, 2))):
        change(draw, changed)
    text = to_json(changed[0]) if changed else ""
    return damage(draw, text.encode(errors="surrogatepass"))


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """The bytes of a file that is no JSON."""
    for _ in range(draw(st.integers(1, 3))):
        content = damage(draw, content)
    return content
