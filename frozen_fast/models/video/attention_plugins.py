"""Attention backends of plugins, by the names that model.video.attention takes."""

from __future__ import annotations

from frozen_fast.config import extensions
from frozen_fast.errors import UserError
from frozen_kernels import Backend, add_backend


def known_attention(name: str) -> str:
    """Return the name of an attention backend, which frozen_kernels knows afterwards.

    Raises:
        UserError: for an unknown name, or a plugin that is no frozen_kernels.Backend.
    """
    point = extensions.attention_backends
    point.check(name)
    if name not in point.built_in():
        backend = point.load(name)
        if not isinstance(backend, Backend):
            kind = type(backend).__name__
            raise UserError(f"{point.key}: got {name!r}, a plugin that is a {kind}; allowed: a frozen_kernels.Backend")
        add_backend(name, backend)
    return name
