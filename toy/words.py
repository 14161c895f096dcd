"""The toy's words: two forms of description, their tokens, and a frozen stand-in for umT5."""

import numpy as np
import torch

from .shapes import ATTRIBUTES, names

N = 16  # tokens of a text: words, EOS, PAD ...
PAD, EOS = 0, 1

BRIEF = "a {colour} {shape} moving {direction}"
DETAILED = (
    "a {size} {colour} {shape} starts {place} and moves {speed} {direction}"
    " on a {background} background"
)


def brief(attributes):
    """What a user would ask for: (B, 7) int64 -> B prompts such as "a red circle moving right"."""
    return [BRIEF.format(**values) for values in names(attributes)]


def detailed(attributes):
    """Everything there is to say: (B, 7) int64 -> B captions of 15 words, in the form DETAILED."""
    return [DETAILED.format(**values) for values in names(attributes)]


def parse(text, form=DETAILED):
    """What a text says: attribute -> value, or None where it says nothing valid. Takes any text.

    An attribute is read at its position in the form and nowhere else, since "left" is a place and a
    direction; so a wrong word costs one attribute.
    """
    words = iter(text.split())
    said = dict.fromkeys(ATTRIBUTES)
    for slot in form.split():
        name = slot.strip("{}")
        value = " ".join(next(words, "") for _ in range(2 if name == "place" else 1))
        if slot != name and value in ATTRIBUTES[name]:
            said[name] = value
    return said


class Tokenizer:
    """Text <-> y (B, n) int64: a token for each word, then EOS, then PAD.

    `words[i]` is the word of token i. vocabulary: the words (default: this world's), n: tokens.
    """

    def __init__(self, vocabulary=None, n=N):
        values = " ".join(value for options in ATTRIBUTES.values() for value in options)
        grammar = [word for word in f"{BRIEF} {DETAILED}".split() if "{" not in word]
        self.n = n
        self.words = ["PAD", "EOS", *(vocabulary or sorted({*values.split(), *grammar}))]
        self.ids = {word: i for i, word in enumerate(self.words) if i > EOS}

    def __len__(self):
        return len(self.words)

    def encode(self, texts):
        """B texts -> y (B, n) int64.

        Raises ValueError for a word outside the vocabulary, and for more than n - 1 words.
        """
        rows = [self.encode_one(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.n)

    def encode_one(self, text):
        """One text -> list of n ints."""
        words = text.split()
        if len(words) > self.n - 1:
            found = f"text has {len(words)} words"
            raise ValueError(f"{found}, wanted at most {self.n - 1}: {text[:60]!r}...")
        for word in words:
            if word not in self.ids:
                raise ValueError(f"word is {word[:60]!r}, wanted one of: {' '.join(self.ids)}")
        return [self.ids[word] for word in words] + [EOS] + [PAD] * (self.n - 1 - len(words))

    def decode(self, y):
        """y (B, any length) int64 -> B texts, each cut at its first EOS.

        Raises ValueError for an id out of range.
        """
        if y.numel() and not 0 <= y.min() <= y.max() < len(self):
            raise ValueError(f"token ids span {y.min()}..{y.max()}, wanted 0..{len(self) - 1}")
        rows = (row[: row.index(EOS)] if EOS in row else row for row in y.tolist())
        return [" ".join(self.words[i] for i in row) for row in rows]


class PromptEncoder:
    """Text -> c (B, n, width) float32: for each word a fixed random vector and its position's code.

    The vectors have unit variance. After the words come zeros, not a mask, as in Wan; so "" is all
    zeros, the null prompt.
    """

    def __init__(self, tokenizer, width=64):
        self.tokenizer, self.width = tokenizer, width
        stream = np.random.RandomState(0)  # its numbers are the same in every version of numpy
        self.word = torch.from_numpy(stream.randn(len(tokenizer), width)).float()
        rate = 100.0 ** -torch.linspace(0, 1, width // 2)
        angle = torch.arange(tokenizer.n)[:, None] * rate  # (n, width/2)
        self.position = torch.cat([angle.sin(), angle.cos()], 1)  # (n, width)

    def __call__(self, texts):
        """B texts -> c (B, n, width). Raises ValueError as Tokenizer.encode does."""
        y = self.tokenizer.encode(texts)  # (B, n)
        return (self.word[y] + self.position) * (y > EOS)[..., None]  # (B, n, width)
