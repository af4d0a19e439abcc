"""Declarations of sections and keys: strict, frozen pydantic dataclasses that refuse unknown keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import dataclass_transform

T = TypeVar("T")
V = TypeVar("V")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
MISTAKES = "mistakes"
UNKNOWN_NAME = "unknown_name"


class NameTable(Protocol):
    """What `key(names=...)` takes: extension points and others that list their names."""

    def names(self) -> Collection[str]:
        """Every name that a config may use."""
        ...

    def built_in(self) -> Collection[str]:
        """The names that every installation has."""
        ...


class OneOf:
    """Annotation of a text key whose value is a name of a table."""

    def __init__(self, table: NameTable | Collection[str]) -> None:
        self.table = table

    def names(self) -> tuple[str, ...]:
        """The allowed names, including those of plugins."""
        return tuple(self.table if isinstance(self.table, Collection) else self.table.names())

    def built_in(self) -> tuple[str, ...]:
        """The names without those of plugins."""
        return tuple(self.table if isinstance(self.table, Collection) else self.table.built_in())

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name after the type."""

        def check(value: str | None) -> str | None:
            if value is not None and value not in self.names():
                allowed = ", ".join(sorted(self.names()))
                raise PydanticCustomError(UNKNOWN_NAME, "allowed: {allowed}", {"allowed": allowed})
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


class _AsMapping:
    """Reads a mapping into a tuple of pairs, which is frozen and hashable."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        value = get_args(get_args(source)[0])[1]
        mapping = core_schema.dict_schema(core_schema.str_schema(strict=True), handler.generate_schema(value))

        def pairs(read: CoreSchema) -> CoreSchema:
            return core_schema.no_info_after_validator_function(lambda items: tuple(items.items()), read)

        from_pairs = core_schema.no_info_before_validator_function(dict, mapping)
        return core_schema.json_or_python_schema(json_schema=pairs(mapping), python_schema=pairs(from_pairs))


Named = Annotated[tuple[tuple[str, V], ...], _AsMapping()]
"""Names to values: a mapping in YAML, a tuple of pairs in Python."""

Count = Annotated[int, Field(ge=1)]
"""An integer from 1."""


def key(
    default: Any,
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    not_blank: bool = False,
    names: NameTable | Collection[str] | None = None,
) -> Any:
    """A config key.

    Args:
        default: its value if the config does not set it.
        meaning: one line, shown by --help-config and in docs/config.md.
        ge: smallest value.
        gt: all values are larger.
        le: largest value.
        lt: all values are smaller.
        not_blank: the text must contain a character that is not white space.
        names: the table that must contain the value. It is read when a config is loaded, so that it includes
            plugins.
    """
    if isinstance(default, (list, dict)):
        raise TypeError("use a tuple or an instance of a section as a default")
    info = Field(default=default, description=meaning, ge=ge, gt=gt, le=le, lt=lt, pattern=r"\S" if not_blank else None)
    if names is not None:
        info.metadata.append(OneOf(names))
    return info


def section(cls: type, meaning: str) -> Any:
    """A nested group of keys, filled with its own defaults."""
    return Field(default_factory=cls, description=meaning)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def dataclass(*, frozen: Literal[True], kw_only: Literal[True]) -> Callable[[type[T]], type[T]]:
    """A section of the schema: its keys are validated on construction."""
    return pydantic_dataclass(frozen=frozen, kw_only=kw_only, config=STRICT)  # type: ignore[return-value]


def refuse(found: Iterable[tuple[str, str]]) -> None:
    """Raise an error for keys that contradict each other; for the validators of sections.

    Args:
        found: for each mistake the key below the section ("" for the section itself, "stages[0].frames" further
            down) and "got ...; allowed: ...". Nothing is raised for none.

    Raises:
        PydanticCustomError: which `convert.build` turns into one line for each mistake.
    """
    mistakes = list(found)
    if mistakes:
        text = "; ".join(f"{where}: {what}" if where else what for where, what in mistakes)
        raise PydanticCustomError(MISTAKES, "{text}", {"text": text, "found": mistakes})
