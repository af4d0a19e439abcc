"""Finetune a checkpoint on own clips: python finetune_own_clips.py CHECKPOINT MANIFEST RUN_FOLDER [key.path=value ..].

The manifest is JSON lines: {"id", "path", "captions": [..], "kind": "video"} (docs/data.md).
"""

import sys

from frozen_fast import DualEncoder
from frozen_fast.config import config_from_mapping
from frozen_fast.training.run import train

checkpoint, manifest, run_folder, *overrides = sys.argv[1:]
model = DualEncoder.from_pretrained(checkpoint)
settings = {
    "name": "finetuned",
    "run_folder": run_folder,
    "model": {"checkpoint": checkpoint, "text": {"max_tokens": model.tokenizer.max_tokens}},
    "data": {"sources": [{"name": "own", "path": manifest}]},
    "curriculum": {"stages": [{"frames": model.learned_frames, "global_batch_size": 16, "steps": 500}]},
    "optimizer": {"learning_rate": 1e-5},
    "evaluation": {"sources": [{"name": "own", "path": manifest}], "every": "end"},
}
sys.exit(train(config_from_mapping(settings, overrides)))
