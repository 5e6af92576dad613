"""The reference of errors, drawn from the classes in each room's `errors.py` and from every place that raises one.

A message is shown as it stands in the code, with what it fills in by name, in italics. What comes after its
last semicolon is what to do, by the rule that every message of ours names the file, the cause and the fix.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "storage", "nested_ats", "cluster")
_WORDS = re.compile(r"[A-Za-z]{2}")
_FILLED = re.compile("\x02(.*?)\x03")  # the name of what is filled in, until it becomes Markdown


class ErrorType(NamedTuple):
    """A type of error that a user can cause.

    Attributes
    ----------
    name : of the class
    room : the package that has it
    meaning : its docstring
    """

    name: str
    room: str
    meaning: str


def error_types() -> list[ErrorType]:
    """Of all rooms, in the order in which they stand."""
    found = []
    for room in ROOMS:
        for node in ast.parse((ROOT / room / "errors.py").read_text()).body:
            if isinstance(node, ast.ClassDef):
                meaning = (ast.get_docstring(node) or "").partition("\n\nAttributes\n")[0]
                found.append(ErrorType(node.name, room, meaning))
    return found


def messages() -> dict[str, list[str]]:
    """All messages of each type, each once, in the order of the files."""
    found: dict[str, list[str]] = {each.name: [] for each in error_types()}
    for room in ROOMS:
        constants = _constants(room)
        for file in sorted((ROOT / room).rglob("*.py")):
            calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
            for call in sorted(calls, key=lambda node: node.lineno):
                name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
                if name in found and call.args:
                    text = " ".join(_shown(call.args[0], constants).split())
                    if _WORDS.search(_FILLED.sub("", text)) and text not in found[name]:
                        found[name].append(text)
    return found


def _constants(room: str) -> dict[str, str]:
    """Texts that several messages of a room share, by the names of their constants."""
    found = {}
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


def _shown(node: ast.expr, constants: dict[str, str]) -> str:
    """Write a message as it stands in the code; what is filled in goes by its name."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.JoinedStr(values=parts):
            return "".join(_shown(part, constants) for part in parts)
        case ast.FormattedValue(value=value) if not (isinstance(value, ast.Name) and value.id in constants):
            return f"\x02{_named(value)}\x03"
        case ast.FormattedValue(value=value):
            return _shown(value, constants)
        case ast.BinOp(left=left, right=right, op=ast.Add()):
            return _shown(left, constants) + _shown(right, constants)
    return f"\x02{_named(node)}\x03"


def _named(node: ast.AST) -> str:
    """Name what an expression fills in: by its last attribute, or by what a function is given."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Name() | ast.Attribute(attr="join"), args=[first, *_]):
            return _named(first)
        case ast.Call(func=inner) | ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.BinOp(left=inner):
            return _named(inner)
        case ast.GeneratorExp(elt=inner) | ast.BoolOp(values=[inner, *_]) | ast.IfExp(body=inner):
            return _named(inner)
    return "..."


def lines() -> Iterator[str]:
    """Markdown of the page: a heading for each type, its meaning, and a table of its messages."""
    said = messages()
    for each in error_types():
        yield f"\n## {each.name}\n\n`{each.room}.errors.{each.name}`. {each.meaning}\n"
        if said[each.name]:
            yield "| message | what to do |\n|---|---|"
            for text in sorted(said[each.name], key=str.lower):
                what, _, fix = text.rpartition("; ")
                yield f"| {_cell(what or fix)} | {_cell(fix) if what else ''} |"


def _cell(text: str) -> str:
    """Escape what Markdown would read; what is filled in stands in italics."""
    return _FILLED.sub(r"*\1*", re.sub(r"([*_`\[\]<>|\\])", r"\\\1", text))
