"""What pages of the site take from elsewhere: READMEs, commands, configuration, errors, and layers of modules.

A page says what it wants by a line ``<!-- readme: PATH -->``, ``<!-- names: PACKAGE -->`` for all that a package
offers, or by commands, keys, errors or layers in its place.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

sys.path.append(str(Path(__file__).parent))
import errors_page

ROOT = Path(__file__).parents[1]
PAGES = {
    **{f"docs/{page.name}": page.name for page in sorted((ROOT / "docs").glob("*.md"))},
    "README.md": "index.md",
    "nested_ats/README.md": "models.md",
    "storage/README.md": "pyramids.md",
    "cluster/README.md": "workers.md",
}
# (heading, file, class), in the order in which a user meets them
SECTIONS = [
    ("The run", "pipeline/config.py", "Config"),
    ("model, whatever its kind", "nested_ats/config.py", "EncoderConfig"),
    ("model, where it sees patches", "nested_ats/config.py", "PatchConfig"),
    ("model, kind: ats", "nested_ats/config.py", "ModelConfig"),
    ("model.levels, each", "nested_ats/config.py", "LevelConfig"),
    ("model, kind: deepmil", "nested_ats/config.py", "DeepMILConfig"),
    ("model, kind: uniform", "nested_ats/config.py", "UniformConfig"),
    ("model, kind: cnn", "nested_ats/config.py", "CNNConfig"),
    ("target, kind: classes", "pipeline/sections.py", "ClassesTarget"),
    ("target, kind: ordinal", "pipeline/sections.py", "OrdinalTarget"),
    ("target, kind: multilabel", "pipeline/sections.py", "MultiLabelTarget"),
    ("target, kind: regression", "pipeline/sections.py", "RegressionTarget"),
    ("target, kind: cox", "pipeline/sections.py", "CoxTarget"),
    ("target, kind: survival", "pipeline/sections.py", "SurvivalTarget"),
    ("train", "pipeline/sections.py", "TrainConfig"),
    ("train.augment", "pipeline/sections.py", "AugmentConfig"),
    ("data", "pipeline/sections.py", "DataConfig"),
    ("data.cache", "pipeline/sections.py", "CacheConfig"),
    ("data.features", "pipeline/sections.py", "FeaturesConfig"),
    ("predict", "pipeline/sections.py", "PredictConfig"),
]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page wants."""
    markdown = re.sub(r"<!-- readme: (\S+) -->", lambda match: _readme(match[1]), markdown)
    markdown = re.sub(r"<!-- names: (\S+) -->", lambda match: "\n\n".join(_names(match[1])), markdown)
    made = {"commands": _commands, "keys": _keys, "errors": errors_page.lines, "layers": _layers}
    for name, lines in made.items():
        if (wanted := f"<!-- {name} -->") in markdown:  # each takes its time
            markdown = markdown.replace(wanted, "\n".join(lines()))
    return _relink(markdown, Path("docs"))


def _readme(name: str) -> str:
    return _relink((ROOT / name).read_text().replace("](docs/", "]("), Path(name).parent)


def _relink(text: str, folder: Path) -> str:
    """Links to files of the repository lead to their pages; of those that have none the text stays."""

    def lead(match: re.Match[str]) -> str:
        words, (target, mark, place) = match[1], match[2].partition("#")
        if "://" in target or not target or target in PAGES.values():
            return match[0]
        path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        return f"[{words}]({PAGES[path]}{mark}{place})" if path in PAGES else words

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", lead, text)


def _names(package: str) -> Iterator[str]:
    """Ask mkdocstrings for every public name of a package."""
    yield from (f"::: {package}.{name}" for name in importlib.import_module(package).__all__)


def _layers() -> Iterator[str]:
    """Draw the layers of the import contracts, a box of modules for each line of a contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for contract in contracts:
        if contract["type"] == "layers":
            room = contract["layers"][0].partition(".")[0] + "."
            lines = [layer.replace(room, "").replace("|", "│") for layer in contract["layers"]]
            width = max(map(len, lines))
            boxes = [f"│ {line:^{width}} │" for line in lines]
            below = f"├{'─' * (width // 2 + 1)}▼{'─' * (width - width // 2)}┤"
            edge = "─" * (width + 2)
            yield f"\n**{contract['name']}**\n\n```text\n┌{edge}┐"
            yield f"\n{below}\n".join(boxes)
            yield f"└{edge}┘\n```"


def _commands() -> Iterator[str]:
    from pipeline.cli.app import app

    yield from _command(typer.main.get_command(app), "nested-ats")


def _command(command: Any, name: str) -> Iterator[str]:
    """Describe a command and those below it."""
    if name != "nested-ats":
        yield f"\n## `{name}`\n"
    yield (command.help or "").replace("\b\n", "").strip() + "\n"
    rows = [row for row in map(_parameter, command.params) if row]
    if rows:
        yield "| | |\n|---|---|"
        yield from rows
    for below in getattr(command, "commands", {}).values():
        yield from _command(below, f"{name} {below.name}")


def _parameter(parameter: Any) -> str | None:
    words = ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        words = f"`{(parameter.metavar or parameter.name).upper()}`"
    text = " ".join((getattr(parameter, "help", None) or "").split())
    default = parameter.default
    if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
        text += f" Default: `{default}`."
    return f"| {words} | {text.replace('|', chr(92) + '|')} |" if text else None


def _keys() -> Iterator[str]:
    for heading, file, name in SECTIONS:
        source = (ROOT / file).read_text()
        [node] = [each for each in ast.parse(source).body if isinstance(each, ast.ClassDef) and each.name == name]
        yield f"\n## {heading}\n\n{ast.get_docstring(node)}\n"
        yield "| key | type | default | |\n|---|---|---|---|"
        comments = _comments(source)
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id[0] != "_":
                yield _row(each.target.id, each, comments)


def _row(key: str, field: ast.AnnAssign, comments: dict[int, _Comment]) -> str:
    limits, default = [], field.value
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "Field":
        values = {word.arg: ast.unparse(word.value) for word in default.keywords}
        signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        limits = [f"{sign} {values[word]}" for word, sign in signs.items() if word in values]
        shown = values.get("default", "")
    else:
        shown = ast.unparse(default) if default else "required"
    shown = {"None": "null", "True": "true", "False": "false"}.get(shown, shown.replace("'", ""))
    shown = "" if "Config(" in shown else shown  # sections, which have their own tables
    end = field.end_lineno or field.lineno
    words = [comments[line].words for line in range(field.lineno, end + 1) if line in comments]
    while words and (following := comments.get(end := end + 1)) and following.alone and following.words[:1].islower():
        words.append(following.words)
    if not words:  # what stands above it
        line = field.lineno
        while (above := comments.get(line := line - 1)) and above.alone:
            words.insert(0, above.words)
    kind = " ".join([f"`{ast.unparse(field.annotation).replace(' | ', ' or ')}`", *limits])
    cells = [f"`{key}`", kind, f"`{shown}`" if shown else "", " ".join(words)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


class _Comment(NamedTuple):
    words: str
    alone: bool  # with no code before it on its line


def _comments(source: str) -> dict[int, _Comment]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: _Comment(token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }
