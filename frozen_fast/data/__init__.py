"""Sources of clips, frame sampling, decoding and data loading."""

from frozen_fast.data.load.bad_clips import BadClip, BadClipLedger
from frozen_fast.data.load.evaluation_loader import EvaluationBatch, EvaluationLoader
from frozen_fast.data.load.prefetch import LoaderEndedError
from frozen_fast.data.load.training_loader import Batch, ClipReader, TrainingLoader
from frozen_fast.data.plan.samplers import BatchSpec, DataPosition, plan_steps
from frozen_fast.data.sources import Clip, Source, read_source, read_sources, twin_pairs

__all__ = [
    "BadClip",
    "BadClipLedger",
    "Batch",
    "BatchSpec",
    "Clip",
    "ClipReader",
    "DataPosition",
    "EvaluationBatch",
    "EvaluationLoader",
    "LoaderEndedError",
    "Source",
    "TrainingLoader",
    "plan_steps",
    "read_source",
    "read_sources",
    "twin_pairs",
]
