"""Zero-shot labels: each label becomes sentences, and a clip gets the label whose sentences are closest.

Axis letters: V clips, C labels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from frozen_fast.errors import UserError
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.search.embed import text_vectors

DEFAULT_TEMPLATES = ("{}", "a video of {}", "a clip that shows {}")


def read_lines(path: Path, field: str) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        UserError: it cannot be read, is empty, or holds a line twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: got {str(path)!r}, which cannot be read ({error}); allowed: UTF-8 text") from None
    if not lines or len(set(lines)) < len(lines):
        raise UserError(
            f"{field}: got {len(lines)} lines, {len(set(lines))} distinct; allowed: one per line, without duplicates"
        )
    return lines


def label_vectors(model: RetrievalModel, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """One vector per label: the mean of its sentences' vectors, normalised.

    Args:
        model: in eval mode.
        labels: C texts.
        templates: sentences with {} where the label goes.

    Returns:
        [C, D] fp32, rows of L2 norm 1.

    Raises:
        UserError: no label, or a template without {}.
    """
    if not labels:
        raise UserError("--labels: got none; allowed: one or more")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"--templates: got {template!r}; allowed: a sentence with one {{}} in place of the label")
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    rows = text_vectors(model, sentences).view(len(labels), len(templates), -1)
    return F.normalize(rows.mean(1), dim=-1)


def best_labels(clips_VD: Tensor, labels_CD: Tensor, top: int, temperature: float = 0.05) -> tuple[Tensor, Tensor]:
    """The closest labels of each clip.

    Args:
        clips_VD: rows of L2 norm 1.
        labels_CD: likewise.
        top: labels per clip.
        temperature: divides the similarities before the softmax over labels (the training temperature).

    Returns:
        (probabilities [V, top], label indices [V, top]), best first.
    """
    shares_VC = torch.softmax(clips_VD @ labels_CD.T / temperature, dim=-1)
    best = shares_VC.topk(min(top, labels_CD.shape[0]), dim=-1)
    return best.values, best.indices
