"""The toy world: moving shapes, their words, a fixed codec, and an oracle that reads videos."""

import sys

from engine.threads import spin_briefly_beside_others
from engine.world import in_turn

if sys.argv[0] == "-m":  # a program of this package is about to run
    spin_briefly_beside_others()

import torch
from torch.utils.data import Dataset

from . import evaluate as evaluation
from . import shapes, words
from .codec import Codec


class World:
    """An engine.world.World of clips that are drawn on the fly, endlessly."""

    sampling: dict = evaluation.SAMPLING
    sizes: dict = {}
    texts = ("prompt", "caption")
    device = torch.device("cpu")  # too small for another
    fixed_size = True
    fps = 8
    negative_prompt = ""
    prompted_by = "prompt"  # the text that c is made of, or "caption"

    def __init__(self, seed=0):
        self.seed = seed
        self.codec = Codec()
        self.tokenizer = words.Tokenizer()
        self.prompt_encoder = words.PromptEncoder(self.tokenizer)
        self.shape = self.codec.latent_shape(shapes.T, shapes.H, shapes.W)  # (C, F, H, W)
        self.frame_shape = (3, shapes.T, shapes.H, shapes.W)
        self.frame_sizes = [(shapes.H, shapes.W)]
        self.text_len = words.N

    @property
    def state(self):
        return {"world": "toy", "sampling": self.sampling}

    def options(self, mode, shape):
        return dict(self.sampling[mode])

    def check(self, config):
        """Raises ValueError where a model's sizes do not fit the toy's."""
        data = f"as the data {self.state['world']!r} has"
        wanted = {
            "in_dim": self.shape[0],
            "out_dim": self.shape[0],
            "vocab_size": len(self.tokenizer),
            "text_len": self.text_len,
            "prompt_dim": self.prompt_encoder.width,
        }
        for name, size in wanted.items():
            if getattr(config, name) != size:
                found = f"{name} is {getattr(config, name)}"
                raise ValueError(f"{found}, wanted {size}, {data}")
        if config.prompt_len < self.text_len:
            found = f"prompt_len is {config.prompt_len}"
            raise ValueError(f"{found}, wanted at least {self.text_len}, {data}")
        if any(size % patch for size, patch in zip(self.shape[1:], config.patch_size)):
            found = f"patch_size is {config.patch_size}"
            raise ValueError(f"{found}, wanted divisors of {self.shape[1:]}, {data}")

    def dataset(self, split):
        """The clips of "train", "seen" or "unseen". Raises ValueError for another split."""
        return Shapes(self, split)

    def evaluate(self, model, out, clips, elapsed, has_text, share=in_turn):
        """See toy/evaluate.py."""
        return evaluation.evaluate(model, self, out, clips, elapsed, has_text, share)


class Shapes(Dataset):
    """Endless clips: any integers >= 0 are indices, so it has no length and stores nothing.

    A batch is drawn at once and comes out collated: a DataLoader needs a batch sampler, and a
    `collate_fn` that returns what it is given.
    """

    def __init__(self, world, split):
        if split not in shapes.SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {', '.join(shapes.SPLITS)}")
        self.world, self.split = world, split

    def clips(self, indices):
        """The true attributes and starts behind these indices, as shapes.Clips."""
        return shapes.sample(indices, self.split, self.world.seed)

    def texts(self, clips):
        """What each clip's "prompt" and "caption" say."""
        return {
            "prompt": words.brief(clips.attributes),
            "caption": words.detailed(clips.attributes),
        }

    def render(self, clips):
        """Their frames."""
        return shapes.render(clips)

    def batch(self, step, size):
        """The indices of batch number `step`: clips that no batch before it had."""
        return range(step * size, (step + 1) * size)

    def __getitems__(self, indices):
        """B indices -> a batch: "z_v" (B, C, F, H, W) and "c" (B, L, width), float32, and
        "prompt" and "caption" (B, N), int64.
        """
        clips = self.clips(indices)
        texts = self.texts(clips)
        batch = {name: self.world.tokenizer.encode(of) for name, of in texts.items()}
        batch["z_v"] = self.world.codec.encode(self.render(clips))
        batch["c"] = self.world.prompt_encoder(texts[self.world.prompted_by])
        return batch

    def __getitem__(self, index):
        """One index -> the same dict without the batch axis."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}
