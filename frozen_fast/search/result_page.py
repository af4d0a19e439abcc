"""Results of one search as a page that needs nothing else: a frame, a score and a place for each."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from frozen_fast.common.files import write_atomically
from frozen_fast.data.load.previews import preview_jpeg
from frozen_fast.errors import UserError
from frozen_fast.search.index import Hit
from frozen_fast.search.row_table import row_clip

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1c1c1c; background: #fff; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; padding: 0; }
li { list-style: none; border: 1px solid #ddd; border-radius: 6px; overflow: hidden; }
img { display: block; width: 100%; background: #eee; }
p { margin: 0.5rem; overflow-wrap: anywhere; } .where { color: #555; font-size: 13px; }
"""


def write_result_page(path: Path, query: str, hits: Sequence[Hit]) -> Path:
    """Write results as one HTML file with a frame of each clip inside.

    Args:
        path: the file.
        query: what was searched for.
        hits: the results, best first.

    Returns:
        The path.
    """
    items = "\n".join(_item(hit) for hit in hits)
    write_atomically(
        path,
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(query)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(query)}</h1>\n<ol>\n{items}\n</ol></html>\n",
    )
    return path


def _item(hit: Hit) -> str:
    try:
        data = base64.b64encode(preview_jpeg(row_clip(asdict(hit)))).decode()
        picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    except UserError as error:
        picture = f"<p>{escape(str(error))}</p>"
    times = ""
    if hit.start_seconds is not None or hit.end_seconds is not None:
        end = "the end" if hit.end_seconds is None else f"{hit.end_seconds:g} s"
        times = f" {hit.start_seconds or 0:g} s to {end}"
    caption = f"<p>{escape(hit.caption)}</p>" if hit.caption else ""
    where = escape(f"{hit.path}{times}")
    return f'<li>{picture}<p>{hit.rank}. score {hit.score:.4f}</p>{caption}<p class="where">{where}</p></li>'
