"""Conditions on an index's columns, such as kind=video or caption~dog."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from frozen_fast.errors import UserError, unknown_name

_CONDITION = re.compile(r"\s*([A-Za-z_]\w*)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARISONS: dict[str, Any] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def matching_rows(table: pa.Table, conditions: Sequence[str]) -> np.ndarray:
    """The rows that fulfil every condition; a row without a value (null) fulfils none on that column.

    Args:
        table: an index's rows.
        conditions: COLUMN OPERATOR VALUE with one of = != < <= > >= ~; ~ means "contains", without regard to case.

    Returns:
        Boolean mask of the table's rows.

    Raises:
        UserError: not a condition, an unknown column, or a value of the wrong type.
    """
    mask_N = np.ones(table.num_rows, bool)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        if found is None:
            raise UserError(f"--where: got {condition!r}; allowed: COLUMN=VALUE, also != < <= > >= ~ (contains)")
        column, operator, value = found.groups()
        if column not in table.column_names:
            raise unknown_name("--where", column, table.column_names)
        mask_N &= _compare(table[column], operator, value, condition)
    return mask_N


def _compare(values: pa.ChunkedArray, operator: str, text: str, condition: str) -> np.ndarray:
    kind = values.type
    if operator == "~":
        if not pa.types.is_string(kind):
            raise UserError(f"--where: got {condition!r}; allowed: ~ on columns of text")
        mask = pc.match_substring(values, text, ignore_case=True)
    else:
        try:
            value = pa.scalar(text if pa.types.is_string(kind) else float(text))
        except ValueError:
            raise UserError(f"--where: got {condition!r}; allowed: a number, for a column of numbers") from None
        mask = _COMPARISONS[operator](values, value)
    return np.asarray(pc.fill_null(mask, False))
