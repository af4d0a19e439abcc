"""Strict YAML: numbers and booleans of YAML 1.2, no duplicate keys, and the line of every value.

PyYAML follows YAML 1.1, where `1e-5` is text, `on` is true, `1:30` is 90 and `2020-01-01` is a date. In a
config, `fused: on` and `eps: 1e-6` mean the word and the number, so this file replaces those rules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from frozen_fast.errors import UserError

Origins = dict[str, str]
"""Path of a value (`data.sources[0].path`) -> its file and line (`configs/demo.yaml line 12`)."""

MAX_DEPTH = 50
"""Levels of mappings and lists in a document; the paths of overrides have no more steps either."""
MAX_VALUES = 100_000
"""Values of a document, each counted wherever an alias repeats it."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, no duplicate keys and a limit on the depth."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and what is below it; PyYAML calls itself here for every level."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise UserError(f"{self.name} line {line}: got more than {MAX_DEPTH} levels; allowed: {MAX_DEPTH} or fewer")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes text that either YAML version would parse as another type."""


_RULES = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RULES:
    _StrictLoader.add_implicit_resolver(_tag, _pattern, _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    resolver = _StrictLoader("")
    try:
        plain_is_text = resolver.resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    finally:
        resolver.dispose()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain_is_text else "'")


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    """Lists of scalars go on one line."""
    short = not any(isinstance(item, (dict, list)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True if short else None)


_StrictDumper.add_representer(str, _represent_text)
_StrictDumper.add_representer(list, _represent_list)


def parse_scalar_or_flow(text: str, field: str) -> Any:
    """Read the value of a `key.path=value` override: a YAML scalar, list or mapping on one line."""
    value, _ = parse(text, name=field, root="")
    return value


def parse(text: str, *, name: str, root: str = "") -> tuple[Any, Origins]:
    """Read one YAML document.

    Args:
        text: the document.
        name: its name in messages, usually the file's path.
        root: path of the document's top value, a prefix of every origin.

    Returns:
        The value (None for an empty document) and the line of every value in it.

    Raises:
        UserError: for invalid YAML, a duplicate key or a key that is not text, with the line.
    """
    loader = None
    try:
        loader = _StrictLoader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None, {}
        origins: Origins = {}
        _note_lines(node, root, name, origins, ())
        return loader.construct_document(node), origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise UserError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path) -> tuple[Any, Origins]:
    """Read one YAML file; see `parse`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config: got {str(path)!r}; allowed: a YAML file that exists{_nearby(path)}") from None
    except IsADirectoryError:
        raise UserError(f"config: got {str(path)!r}, a folder; allowed: a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"config: got {str(path)!r}, which is not UTF-8 text ({error.reason} at byte {error.start}); "
            "allowed: a YAML file"
        ) from None
    except OSError as error:
        raise UserError(
            f"config: got {str(path)!r}, which cannot be read ({error.strerror}); allowed: a readable YAML file"
        ) from None
    return parse(text, name=str(path))


def dump(value: Any) -> str:
    """Write plain values (mappings, lists, scalars) as YAML with the same meaning in versions 1.1 and 1.2."""
    return yaml.dump(
        value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False
    )


def dump_inline(value: Any) -> str:
    """Write one plain value on one line."""
    text = yaml.dump(
        value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=True
    )
    return text.removesuffix("...\n").strip()


def join_path(parent: str, name: str | int) -> str:
    """Path of a mapping's key or a list's item: `a.b`, `a[0]`."""
    if isinstance(name, int):
        return f"{parent}[{name}]"
    return f"{parent}.{name}" if parent else name


def _nearby(path: Path) -> str:
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f" (the folder {str(path.parent)!r} does not exist)"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.y*ml")], n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


def _note_lines(node: yaml.Node, path: str, name: str, origins: Origins, above: tuple[int, ...]) -> None:
    """Fill origins for a node and its children; refuse duplicate and non-text keys."""
    if id(node) in above:
        raise UserError(f"{name} line {node.start_mark.line + 1}: {path}: an alias refers to what contains it")
    above = (*above, id(node))
    if len(origins) >= MAX_VALUES:
        got = f"got more than {MAX_VALUES} values, those that aliases repeat counted each time"
        raise UserError(f"{name}: {got}; allowed: {MAX_VALUES} or fewer")
    origins[path] = f"{name} line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, join_path(path, index), name, origins, above)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise UserError(f"{name} line {line}: got '<<'; allowed: plain keys (use extends to share settings)")
            if key_node.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{name} line {line}: got the key {key_node.value!r}; allowed: text (quote it)")
            if key_node.value in seen:
                raise UserError(
                    f"{name} line {line}: {join_path(path, key_node.value)} is given twice, "
                    f"first on line {seen[key_node.value]}; allowed: once"
                )
            seen[key_node.value] = line
            _note_lines(value_node, join_path(path, key_node.value), name, origins, above)
