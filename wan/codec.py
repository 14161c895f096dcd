"""Wan2.1's VAE (frames <-> z_v), its text encoder umT5 (prompts -> c) and umT5's tokenizer.

Each is read from a Wan2.1 folder in the diffusers layout (vae/, text_encoder/, tokenizer/) or from
such a repository of the hub, of which only the part that is needed is downloaded. All raise
FileNotFoundError for a part that is missing, ValueError for one that is damaged or of another kind.
"""

import html
import json
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download

from engine.files import check_fetched, one_line, read_json, shorten

from .shards import EOS, PAD
from .weights import ask_hub, digest, open_safetensors

try:
    import ftfy
    import tokenizers
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed: pip install -r requirements-wan.txt", name=error.name
    ) from None

# Wan2.1's VAE: frames of a latent, its pixels along a side, its channels.
STRIDE_T, STRIDE, CHANNELS = 4, 8, 16
LATENTS = ("normalised", "raw")
# Keys of a config.json that change when another version writes it.
WRITTEN_BY = ("transformers_version", "dtype", "torch_dtype")


class Codec:
    """frames (B, 3, 1 + 4n, H, W) in [-1, 1] <-> z_v (B, 16, 1 + n, H/8, W/8), by Wan's VAE.

    Both are float32 and on the device of what comes in. latents: "normalised" per channel by the
    mean and deviation in the VAE's config, as Wan's transformer wants them, or "raw", as the
    published Uni-ViGU weights do. tiling: large frames in overlapping tiles, for less memory.
    offload: the VAE stays on the CPU between calls.
    """

    def __init__(
        self,
        path,
        device="cpu",
        dtype=torch.float32,
        *,
        latents="normalised",
        tiling=False,
        offload=False,
    ):
        if latents not in LATENTS:
            raise ValueError(f"latents is {latents!r}, wanted one of {', '.join(LATENTS)}")
        self.device, self.offload = torch.device(device), offload
        self.folder = locate(path, "vae")
        self.vae, self.tensors = load_frozen(
            AutoencoderKLWan,
            self.folder,
            "diffusion_pytorch_model",
            torch_dtype=dtype,  # of diffusers, 0.40 is the first to call it dtype
            low_cpu_mem_usage=False,
        )
        if tiling:
            self.vae.enable_tiling()
        config = self.vae.config
        self.check_config(config)
        mean, std = [0.0] * CHANNELS, [1.0] * CHANNELS
        if latents == "normalised":
            mean, std = config.latents_mean, config.latents_std
        self.mean = torch.tensor(mean).view(-1, 1, 1, 1)  # (C, 1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1, 1)  # (C, 1, 1, 1)

    def check_config(self, config):
        """Raises ValueError for a VAE of other strides or channels, or without statistics."""
        file, n = self.folder / "config.json", CHANNELS
        side = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        found = 2 ** sum(config.temperal_downsample), side, config.z_dim
        if found != (STRIDE_T, STRIDE, CHANNELS):
            raise ValueError(
                f"{file} is of a VAE with {found[0]} frames of {side} x {side} pixels a latent and "
                f"{config.z_dim} channels (the 5B of Wan2.2 has 4, 16 and 48), wanted Wan2.1's "
                f"{STRIDE_T} frames, {STRIDE} x {STRIDE} and {CHANNELS}"
            )
        mean, std = config.latents_mean, config.latents_std
        if len(mean) != n or len(std) != n or not min(std) > 0:
            raise ValueError(
                f"{file} has latents_mean {mean} and latents_std {std}, "
                f"wanted {n} of each, deviations above 0"
            )

    @cached_property
    def fingerprint(self):
        """16 hexadecimal digits that change with the VAE's config and weights."""
        return module_digest(self.folder, self.tensors)

    def latent_shape(self, frames, height, width):
        """(C, F, H, W) of z_v for a video of this many frames and pixels.

        Raises ValueError unless whole latents, 2 x 2 of them a token, cover it.
        """
        side = 2 * STRIDE
        if frames < 1 or frames % STRIDE_T != 1:
            raise ValueError(f"video has {frames} frames, wanted {STRIDE_T}n + 1 (1, 5, 9, ...)")
        if min(height, width) < 1 or height % side or width % side:
            raise ValueError(f"video has {height} x {width} pixels, wanted multiples of {side}")
        return CHANNELS, 1 + frames // STRIDE_T, height // STRIDE, width // STRIDE

    def encode(self, frames):
        """frames (B, 3, T, H, W) in [-1, 1] -> z_v (B, C, F, H/8, W/8): the posterior's mean.

        Raises ValueError for frames of another shape or range, and where the VAE gives NaN.
        """
        if frames.ndim != 5 or frames.shape[1] != 3 or not len(frames):
            raise ValueError(f"frames have shape {tuple(frames.shape)}, wanted (B, 3, T, H, W)")
        self.latent_shape(*frames.shape[2:])
        # "not <=" refuses NaN, too
        if not frames.is_floating_point() or not frames.abs().max() <= 1.001:
            span = f"{frames.min():.4g} to {frames.max():.4g}"
            raise ValueError(f"frames are {frames.dtype} from {span}, wanted floats in [-1, 1]")
        with on_device(self.vae, self.device, self.offload):
            posterior = self.vae.encode(frames.to(self.device, self.vae.dtype)).latent_dist
            mu = posterior.mode()  # (B, C, F, H/8, W/8)
        mu = finite(mu, self.folder).to(frames.device)
        return (mu - self.mean.to(frames.device)) / self.std.to(frames.device)

    def decode(self, z_v):
        """z_v (B, C, F, h, w) -> frames (B, 3, 4F - 3, 8h, 8w), clamped to [-1, 1].

        Raises ValueError for another shape and for NaN.
        """
        if z_v.ndim != 5 or z_v.shape[1] != CHANNELS or not z_v.numel():
            shape = tuple(z_v.shape)
            raise ValueError(f"z_v has shape {shape}, wanted (B, {CHANNELS}, F, H, W)")
        if not z_v.isfinite().all():
            raise ValueError("z_v holds NaN or infinity, wanted finite numbers")
        mu = z_v.float() * self.std.to(z_v.device) + self.mean.to(z_v.device)
        with on_device(self.vae, self.device, self.offload):
            frames = self.vae.decode(mu.to(self.device, self.vae.dtype)).sample  # (B, 3, T, H, W)
        return finite(frames, self.folder).to(z_v.device)


class PromptEncoder:
    """Texts -> c (B, length, width) float32 on `device`: umT5's last hidden state.

    Beyond each text's end c is zero, without a mask, as in Wan. dtype: of umT5 (default: bfloat16
    on a GPU, else float32). length: L, tokens with EOS. offload: umT5 stays on the CPU between
    calls.
    """

    def __init__(self, path, device="cpu", dtype=None, *, length=512, offload=False):
        self.device, self.length, self.offload = torch.device(device), length, offload
        self.folder, self.tokenizer = locate(path, "text_encoder"), Tokenizer(path)
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        # umT5's own config says that they are not, and is meant for its decoder
        options = {"dtype": dtype, "tie_word_embeddings": True}
        self.umt5, self.tensors = load_frozen(UMT5EncoderModel, self.folder, "model", **options)
        self.width, rows = self.umt5.config.d_model, self.umt5.config.vocab_size
        if rows < len(self.tokenizer):
            raise ValueError(
                f"{self.folder} knows {rows} tokens, but its tokenizer has {len(self.tokenizer)}"
            )

    @cached_property
    def fingerprint(self):
        """16 hexadecimal digits that change with umT5's config, weights and tokenizer."""
        return module_digest(self.folder, self.tensors, self.tokenizer.file.read_bytes())

    def __call__(self, texts):
        """B texts -> c (B, length, width).

        Raises ValueError for a text of more than `length` tokens, EOS counted, and where umT5 gives
        NaN.
        """
        rows = [self.tokenizer.ids(text) for text in listed(texts)]
        for text, ids in zip(texts, rows):
            if len(ids) > self.length:
                raise ValueError(
                    f"prompt has {len(ids)} tokens with EOS, wanted at most {self.length}: "
                    f"{text[:60]!r}..."
                )
        lengths = torch.tensor([[len(row)] for row in rows], device=self.device)  # (B, 1)
        n = max(map(len, rows))  # umT5 need not see the padding beyond
        ids = torch.tensor([row + [PAD] * (n - len(row)) for row in rows], device=self.device)
        mask = torch.arange(n, device=self.device) < lengths  # (B, n)
        with on_device(self.umt5, self.device, self.offload):
            h = self.umt5(ids, attention_mask=mask.long()).last_hidden_state  # (B, n, width)
        c = finite(h, self.folder).masked_fill(~mask[..., None], 0)
        return F.pad(c, (0, 0, 0, self.length - n))


class Tokenizer:
    """Text <-> y (B, N) int64: umT5's tokens of the cleaned text, then EOS, then PAD.

    length: N, tokens of a text; one of exactly N has no room for EOS and goes without. vocabulary:
    the rising umT5 ids, PAD's and EOS's among them, to which y is restricted; y then holds
    positions in it (None: all of umT5's). tokenizer.json is read as it is, since transformers 5
    would rebuild it with T5's rules, where umT5 has others.
    """

    def __init__(self, path, *, length=256, vocabulary=None):
        self.length, self.file = length, locate(path, "tokenizer") / "tokenizer.json"
        self.umt5 = read_tokenizer(self.file)
        size = self.umt5.get_vocab_size()
        self.vocabulary = list(range(size)) if vocabulary is None else list(vocabulary)
        self.positions = {i: position for position, i in enumerate(self.vocabulary)}
        rising = self.vocabulary == sorted(self.positions)
        if not rising or self.vocabulary[:2] != [PAD, EOS] or self.vocabulary[-1] >= size:
            raise ValueError(
                f"vocabulary has {len(self.vocabulary)} ids, wanted rising ones "
                f"from {PAD} (pad) and {EOS} (EOS) to at most {size - 1}"
            )

    def __len__(self):
        return len(self.vocabulary)

    def ids(self, text):
        """A text -> list of umT5's ids, the last one EOS.

        Raises ValueError for a text that spells PAD or EOS itself.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is {text!r}, wanted a string")
        ids = self.umt5.encode(clean(text)).ids
        if not {PAD, EOS}.isdisjoint(ids[:-1]):
            raise ValueError(f"text spells <pad> or </s>, wanted words: {text[:60]!r}")
        return ids

    def encode(self, texts):
        """B texts -> y (B, N) int64.

        Raises ValueError for one of more than N tokens, EOS not counted, or with tokens outside the
        vocabulary.
        """
        return torch.tensor([self.encode_one(text) for text in listed(texts)])

    def encode_one(self, text):
        """A text -> list of N ints."""
        ids = self.ids(text)
        if len(ids) - 1 > self.length:
            raise ValueError(
                f"text has {len(ids) - 1} tokens, wanted at most {self.length}: {text[:60]!r}..."
            )
        ids = ids[: self.length]
        if unknown := [self.umt5.id_to_token(i) for i in ids if i not in self.positions]:
            raise ValueError(
                f"text has tokens outside the vocabulary of {len(self)}: "
                f"{' '.join(dict.fromkeys(unknown))}; the text: {text[:60]!r}"
            )
        return [self.positions[i] for i in ids] + [PAD] * (self.length - len(ids))

    def decode(self, y):
        """y (B, any length) int64 -> B texts, each cut at its first EOS.

        Raises ValueError for another shape and for an id out of range.
        """
        if y.ndim != 2:
            raise ValueError(f"y has shape {tuple(y.shape)}, wanted (B, N)")
        if y.numel() and not 0 <= y.min() <= y.max() < len(self):
            raise ValueError(f"token ids span {y.min()}..{y.max()}, wanted 0..{len(self) - 1}")
        rows = (row[: row.index(EOS)] if EOS in row else row for row in y.tolist())
        return [self.umt5.decode([self.vocabulary[i] for i in row]) for row in rows]


def read_tokenizer(file):
    """umT5's tokenizer.json. Raises ValueError for one whose PAD or EOS are not umT5's."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} lacks {file.name}")
    try:
        umt5 = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        check_fetched(file)
        raise ValueError(f"{file} cannot be read: {error}") from None
    umt5.no_truncation()
    umt5.no_padding()
    pad, eos, last = umt5.token_to_id("<pad>"), umt5.token_to_id("</s>"), umt5.encode("a").ids[-1]
    if (pad, eos, last) != (PAD, EOS, EOS):
        raise ValueError(
            f"{file} has <pad> {pad}, </s> {eos} and ends texts with {last}, "
            f"wanted {PAD}, {EOS} and {EOS}, as umT5's"
        )
    return umt5


def clean(text):
    """A text as Wan reads it: encoding mistakes mended, HTML entities resolved twice, single
    spaces between words."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


# ---------------------------------------------------------------- files


def locate(path, part):
    """The folder `part` of a Wan2.1 folder or, where there is no such path, of a hub repository."""
    root = Path(path)
    if not root.exists():
        patterns = [f"{part}/*.json", f"{part}/*.safetensors"]
        root = Path(ask_hub(snapshot_download, str(path), allow_patterns=patterns))
    if not (root / part).is_dir():
        raise FileNotFoundError(f"{root} has no folder {part}, wanted Wan2.1 in diffusers' layout")
    return root / part


def load_frozen(cls, folder, stem, **options):
    """A folder's module of class `cls`, frozen; its tensors, see open_safetensors."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} lacks config.json")
    said = read_json(folder / "config.json")
    kind = said.get("_class_name") or (said.get("architectures") or [cls.__name__])[0]
    if kind != cls.__name__:
        raise ValueError(f"{folder / 'config.json'} is of {kind}, wanted {cls.__name__}")
    # names the file that is missing or cut, which from_pretrained does not
    tensors = open_safetensors(folder, stem)
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        module, report = cls.from_pretrained(folder, **options)
    except Exception as error:  # configs and shapes of another model fail in many ways
        reason = f"{type(error).__name__}: {one_line(error)[:500]}"
        raise ValueError(f"{folder} cannot be loaded as {cls.__name__}: {reason}") from None
    faults = [
        f"{fault.replace('_', ' ')} {shorten(sorted(map(str, names)))}"
        for fault, names in report.items()
        if names
    ]
    if faults:
        raise ValueError(f"{folder} does not fit {cls.__name__}: {'; '.join(faults)}")
    return module.eval().requires_grad_(False), tensors


def module_digest(folder, tensors, more=b""):
    """A module's digest: of its config, but for what says who wrote it, its tensors, and `more`."""
    config = {
        name: value
        for name, value in read_json(folder / "config.json").items()
        if name[0] != "_" and name not in WRITTEN_BY
    }
    return digest(tensors, json.dumps(config, sort_keys=True).encode() + more)


# ---------------------------------------------------------------- small things


@contextmanager
def on_device(module, device, offload):
    """The module on `device`, in its own precision and without gradients.

    offload: it goes back to the CPU afterwards.
    """
    try:
        module.to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if offload:
            module.to("cpu")


def finite(x, folder):
    """x in float32. Raises ValueError where it is not finite."""
    if not x.isfinite().all():
        raise ValueError(f"{folder} gives values that are not finite, in {x.dtype}")
    return x.float()


def listed(texts):
    """texts, if it is a list that is not empty; else ValueError."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts is {texts!r}, wanted a list of strings")
    return texts
