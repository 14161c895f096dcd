"""The second world as train.py and sample.py see it: `--data pairs --level 1` to 6."""

import torch

import toy
from engine.world import in_turn

from . import pairs, pairs_evaluate, words
from .codec import Codec

# As toy.codec's: the vectors kept, by falling deviation in the clips of levels 1, 3 and 6.
FIRST = (
    "L a b Ly Lx by ay bx ax Lyx ayx byx ayy byy Lyy bxx Lxx axx byxx ayxx ayyx byyx ayyy byyy"
).split()
GROUP = ("L a b Ly Lx ay ax by bx at bt Lyx Lyy Lxx ayx byx ayy Lt aty bxx byy bty axx atx").split()
DEVIATION = torch.tensor([
    6.29, 3.57, 3.53, 1.57, 1.51, 1.47, 1.47, 1.45, 1.44, 0.78, 0.74, 0.74,
    0.69, 0.68, 0.68, 0.66, 0.66, 0.65, 0.44, 0.44, 0.43, 0.42, 0.42, 0.41,
])  # fmt: skip


# How each mode samples unless told otherwise.
SAMPLING = {
    "understand": {"steps": 2, "guidance": 1.0, "reuse_video": True},
    "generate": {"steps": 16, "guidance": 2.0, "shift": 2.0},
    "joint": {"steps": 16, "guidance": 3.0, "shift": 3.0},
}


class World(toy.World):
    """An engine.world.World of two shapes, at a level."""

    sampling = SAMPLING

    def __init__(self, seed=0, level=1):
        self.seed, self.level = seed, level
        self.codec = Codec(FIRST, GROUP, DEVIATION, motion=2.5)
        self.tokenizer = words.Tokenizer(pairs.vocabulary(), pairs.TOKENS[level])
        self.prompt_encoder = words.PromptEncoder(self.tokenizer)
        self.shape = self.codec.latent_shape(pairs.T, pairs.H, pairs.W)
        self.frame_shape = (3, pairs.T, pairs.H, pairs.W)
        self.frame_sizes = [(pairs.H, pairs.W)]
        self.text_len = pairs.TOKENS[level]

    @property
    def sizes(self):
        return {
            "vocab_size": len(self.tokenizer),
            "text_len": self.text_len,
            "prompt_len": self.text_len,
        }

    @property
    def state(self):
        return {"world": "pairs", "level": self.level, "sampling": self.sampling}

    def dataset(self, split):
        """The clips of "train", "seen" or "unseen". Raises ValueError for another split."""
        return Pairs(self, split)

    def evaluate(self, model, out, clips, elapsed, has_text, share=in_turn):
        """See toy/pairs_evaluate.py."""
        return pairs_evaluate.evaluate(model, self, out, clips, elapsed, has_text, share)


class Pairs(toy.Shapes):
    """Endless clips of two shapes, see toy.Shapes."""

    def clips(self, indices):
        """What is behind these indices, as pairs.Clips."""
        return pairs.sample(indices, self.split, self.world.seed, self.world.level)

    def texts(self, clips):
        """What each clip's "prompt" and "caption" say."""
        return {"prompt": pairs.brief(clips), "caption": pairs.detailed(clips, self.world.level)}

    def render(self, clips):
        """Their frames."""
        return pairs.render(clips)
