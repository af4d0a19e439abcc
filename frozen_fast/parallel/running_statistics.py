"""Averaging of BatchNorm's running statistics over ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from frozen_fast.common.ranks import is_distributed, mean_over_ranks


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Average the running statistics over ranks before an evaluation or a checkpoint; a collective.

    Training normalises by the rank's own batch and does not read them, so this does not change training steps.
    """
    if not is_distributed():
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(mean_over_ranks(statistic))
