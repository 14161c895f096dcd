"""The toy world: moving shapes, their words, a fixed codec, and an oracle that reads videos back."""

import sys

if sys.argv[:1] == ["-m"]:  # as a command; Ctrl-C ends it quietly, also in the imports
    sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)

from torch.utils.data import Dataset

from . import shapes, words
from .codec import Codec
from . import evaluate as evaluation


class World:
    """What the training loop and sample.py need of a world.

    `codec`, `prompt_encoder`, `tokenizer`, `dataset(split)`; `shape` (C, F, H, W) of one z_v, `frame_shape` (3, T, H, W) of
    one clip, `text_len` N; `sampling`: mode -> how it samples by default; `check(config)`, `evaluate(...)`; `sizes`: Config
    fields that the data decides where the preset does not; `state`: what a checkpoint stores to make this world again; `shown`: what the last
    evaluation has to show beside its results, see pages.write_report.
    """

    sampling = evaluation.SAMPLING
    sizes: dict = {}
    shown: dict = {}
    state = {"world": "toy"}
    fixed_size, fps, negative_prompt, endings = True, 8, "", (".gif", ".mp4", ".npy")  # what sample.py asks: the toy has one size

    def __init__(self, seed=0):
        self.seed = seed
        self.codec = Codec()
        self.tokenizer = words.Tokenizer()
        self.prompt_encoder = words.PromptEncoder(self.tokenizer)
        self.shape = self.codec.latent_shape(shapes.T, shapes.H, shapes.W)  # (C, F, H, W)
        self.frame_shape = (3, shapes.T, shapes.H, shapes.W)
        self.text_len = words.N

    def check(self, config):
        """Raises ValueError where a model's sizes are not the world's."""
        for name, wanted in dict(in_dim=self.shape[0], out_dim=self.shape[0], vocab_size=len(self.tokenizer), text_len=self.text_len,
                                 prompt_dim=self.prompt_encoder.width).items():
            if getattr(config, name) != wanted:
                raise ValueError(f"{name} is {getattr(config, name)}, but the data 'toy' has {wanted}")
        if config.prompt_len < self.text_len:
            raise ValueError(f"prompt_len is {config.prompt_len}, but the data 'toy' has prompts of {self.text_len}")
        if any(size % patch for size, patch in zip(self.shape[1:], config.patch_size)):
            raise ValueError(f"patch_size is {config.patch_size}, but the data 'toy' has latents of {self.shape[1:]}, wanted divisors")

    def dataset(self, split):
        """The clips of "train", "seen" or "unseen" as a Dataset. Raises ValueError for another split."""
        return Shapes(self, split)

    def evaluate(self, model, out, clips, elapsed, has_text):
        """See toy/evaluate.py."""
        return evaluation.evaluate(model, self, out, clips, self.seed, elapsed, has_text)


class Shapes(Dataset):
    """Endless clips, made when asked for: any integers >= 0 are indices, so it has no length and stores nothing.

    A batch is made in one go and comes out collated: a DataLoader needs a batch sampler and `collate_fn=lambda batch: batch`.
    """

    def __init__(self, world, split):
        if split not in shapes.SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {', '.join(shapes.SPLITS)}")
        self.world, self.split = world, split

    def clips(self, indices):
        """The true attributes and starts behind these indices, as shapes.Clips."""
        return shapes.sample(indices, self.split, self.world.seed)

    def batch(self, step, size):
        """The indices of batch number `step`: clips that no batch before it had."""
        return range(step * size, (step + 1) * size)

    def __getitems__(self, indices):
        """B indices -> dict(z_v (B, C, F, H, W) float32, prompt and caption (B, N) int64, c (B, L, width) float32)."""
        clips = self.clips(indices)
        prompts = words.brief(clips.attributes)
        return {
            "z_v": self.world.codec.encode(shapes.render(clips)),
            "prompt": self.world.tokenizer.encode(prompts),
            "caption": self.world.tokenizer.encode(words.detailed(clips.attributes)),
            "c": self.world.prompt_encoder(prompts),
        }

    def __getitem__(self, index):
        """One index -> the same dict without the batch axis."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}
