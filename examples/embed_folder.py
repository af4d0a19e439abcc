"""Embed a folder of clips and find the ones that fit a sentence: python embed_folder.py CHECKPOINT FOLDER SENTENCE."""

import sys
from pathlib import Path

import torch

from frozen_fast import load_model

checkpoint, folder, sentence = sys.argv[1:]
model = load_model(checkpoint)
paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".mp4", ".webm", ".avi", ".mkv"))
clips_VD = model.embed_videos(paths, windows="middle")  # rows of L2 norm 1
with torch.no_grad():
    scores_V = (model.encode_text([sentence]) @ clips_VD.T)[0]
for row in scores_V.argsort(descending=True)[:5].tolist():
    print(f"{scores_V[row]:.3f}  {paths[row]}")
