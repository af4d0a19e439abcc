"""Zero-shot action recognition: the predicted class has the prompts that are most similar to the clip.

Axis letters: C classes, P prompts, V clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frozen_fast.errors import UserError

PLACE = "{}"
ACCURACIES = ("top1", "top5", "mean_class_accuracy")
"""Numbers of a Classification that are metrics, in percent."""


@dataclass(frozen=True)
class Classification:
    """Classification results.

    Attributes:
        classes: names.
        clips: number of clips.
        top1: percent whose class is the most probable; ties count fractionally.
        top5: percent whose class is among the five most probable; ties as for top1.
        mean_class_accuracy: mean of the classes' accuracies, in percent.
        per_class: accuracy of each class with clips, in percent.
        confusion: confusion[i][j]: number of clips of class i that are classified as j (ties: the first class).
    """

    classes: tuple[str, ...]
    clips: int
    top1: float
    top5: float
    mean_class_accuracy: float
    per_class: dict[str, float]
    confusion: list[list[int]]


def prompts_of(classes: Sequence[str], templates: Sequence[str], key: str = "evaluation.prompts") -> list[str]:
    """Every class in every template, class by class: [C * P]. `key` is the config key, for messages.

    Raises:
        UserError: a template does not contain {} once.
    """
    for template in templates:
        if template.count(PLACE) != 1:
            allowed = f"texts with {PLACE} once, for the class name"
            raise UserError(f"{key}: got {template!r}; allowed: {allowed}")
    return [template.replace(PLACE, name) for name in classes for template in templates]


def average_prompts(sim_prompts_V: Tensor, num_classes: int) -> Tensor:
    """The mean similarity over a class's prompts: [C * P, V] to [C, V], in the order of prompts_of."""
    return sim_prompts_V.view(num_classes, -1, sim_prompts_V.shape[1]).mean(dim=1)


def classify(sim_CV: Tensor, class_of_clip: Sequence[int], classes: Sequence[str]) -> Classification:
    """Compute the accuracy of choosing the class with the highest similarity.

    Args:
        sim_CV: similarity of every class with every clip, or logits [C, V].
        class_of_clip: class of each clip.
        classes: names, in the order of the rows.

    Raises:
        UserError: the sizes differ, a class is out of range, or a similarity is NaN.
    """
    own_V = torch.as_tensor(class_of_clip, device=sim_CV.device)
    sizes = (len(classes), len(own_V))
    if tuple(sim_CV.shape) != sizes or not len(own_V) or not 0 <= int(own_V.min()) <= int(own_V.max()) < len(classes):
        got = f"{list(sim_CV.shape)} for {sizes[0]} classes and {sizes[1]} clips"
        raise UserError(f"similarities: got {got}; allowed: [classes, clips] and classes in range")
    if bool(torch.isnan(sim_CV).any()):
        raise UserError("similarities: got NaN; allowed: numbers (did a clip or the model produce NaN?)")
    score_V = sim_CV.gather(0, own_V[None])[0]
    above_V = (sim_CV > score_V).sum(0).double()
    equal_V = (sim_CV == score_V).sum(0).double()  # itself included
    hit1_V = ((1 - above_V) / equal_V).clamp(0, 1)
    hit5_V = ((5 - above_V) / equal_V).clamp(0, 1)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=sim_CV.device)
    confusion.index_put_((own_V, sim_CV.argmax(0)), torch.ones_like(own_V), accumulate=True)
    per_class = {
        name: 100.0 * float(hit1_V[own_V == number].mean())
        for number, name in enumerate(classes)
        if bool((own_V == number).any())
    }
    return Classification(
        classes=tuple(classes),
        clips=len(own_V),
        top1=100.0 * float(hit1_V.mean()),
        top5=100.0 * float(hit5_V.mean()),
        mean_class_accuracy=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        confusion=confusion.cpu().tolist(),
    )
