"""What a run begins with: a checkpoint's model, its weights still in their files."""

from dataclasses import asdict
from pathlib import Path

import torch

from engine.checkpoint import SHARDS, Start, read_done

from .weights import is_wan, kept_in, open_base, open_model


def load_own(folder, config, make_model):
    """The Start in a folder that train.py wrote. Raises ValueError, OSError."""
    done, sizes = read_done(folder, config), asdict(config)
    if not Path(folder, SHARDS).is_dir():
        model, read, _ = open_model(folder, make_model=make_model, **sizes)
        return Start(model, read, done)
    if "base" in done:
        model, read, _ = open_base(done["base"], Path(folder), make_model=make_model, **sizes)
    else:
        with torch.device("meta"):
            model = make_model(config)
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def read(name, device, dtype):
            return torch.zeros(shapes[name], device=device, dtype=dtype)

    return Start(model, read, done, shards=Path(folder))


def load_start(folder, config, make_model):
    """The Start that --init names. Raises ValueError, OSError."""
    if not is_wan(folder):
        return load_own(folder, config, make_model)
    model, read, new = open_model(folder, make_model=make_model, **asdict(config))
    return Start(model, read, {} if new else {"stage": "recall"})


def freeze(model, bf16):
    """Leaves the text stream alone to be trained, and keeps the rest in bf16 if asked to."""
    for name, p in model.named_parameters():
        if not model.is_text(name):
            p.requires_grad_(False)
            p.data = p.data.to(kept_in(name, torch.bfloat16 if bf16 else p.dtype))
