"""The sizes and variants of an expert model as plain data: experts, widths and clusters.

Source of the variants: Liu et al. 2019, "Use What You Have", and the released configs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from frozen_fast.errors import UserError

Gating = Literal["in_order", "parallel", "none"]
Mixture = Literal["learned", "uniform"]
GATINGS: tuple[Gating, ...] = ("in_order", "parallel", "none")
MIXTURES: tuple[Mixture, ...] = ("learned", "uniform")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert's features.

    Attributes:
        name: its key in the video's dict of features.
        width: width of a vector; 0: any (a concatenation has no parameters that depend on it).
        clusters: NetVLAD clusters for a variable number of vectors; 0: the video has one vector.
    """

    name: str
    width: int
    clusters: int = 0

    @property
    def pooled_width(self) -> int:
        """Width after aggregation."""
        return self.width * (self.clusters or 1)


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """The values that determine the shapes of an expert model's parameters.

    Attributes:
        experts: experts in the model's order, which is alphabetical unless a checkpoint has another one.
        text_width: width of a token.
        text_clusters: NetVLAD clusters for a caption's tokens.
        ghost_clusters: clusters of the text that are used in the softmax only.
        mask_padding: exclude zero rows from NetVLAD; the released models include them.
    """

    experts: tuple[Expert, ...]
    text_width: int
    text_clusters: int
    ghost_clusters: int = 0
    mask_padding: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        names = [expert.name for expert in self.experts]
        if not names or len(set(names)) != len(names):
            raise UserError(f"model.experts.experts: got {names}; allowed: at least one expert, each name once")
        for expert in self.experts:
            if expert.width < (1 if expert.clusters else 0) or expert.clusters < 0:
                got = f"{expert.name} of width {expert.width} with {expert.clusters} clusters"
                raise UserError(f"model.experts.experts: got {got}; allowed: width 1 or more, clusters 0 or more")
        for key in ("text_width", "text_clusters"):
            if getattr(self, key) < 1:
                raise UserError(f"model.experts.{key}: got {getattr(self, key)}; allowed: 1 or more")
        if self.ghost_clusters < 0:
            raise UserError(f"model.experts.ghost_clusters: got {self.ghost_clusters}; allowed: 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names in the model's order."""
        return tuple(expert.name for expert in self.experts)

    @property
    def pooled_text_width(self) -> int:
        """Width of an aggregated caption."""
        return self.text_width * self.text_clusters

    def to_json(self) -> dict[str, Any]:
        """Return the entry for config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExpertSizes:
        """Build from an entry of config.json.

        Raises:
            UserError: a key is missing or unknown.
        """
        try:
            rest = {entry.name: data[entry.name] for entry in fields(cls) if entry.name != "experts"}
            return cls(experts=tuple(Expert(**expert) for expert in data["experts"]), **rest)
        except (KeyError, TypeError) as error:
            raise UserError(f"checkpoint: config.json does not describe an expert model ({error})") from error


def in_alphabetical_order(experts: Sequence[Expert]) -> tuple[Expert, ...]:
    """Sort experts by name, as in the released models."""
    return tuple(sorted(experts, key=lambda expert: expert.name))
