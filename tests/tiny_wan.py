"""A tiny random Wan2.1 on disk, small videos and a hub without a network, for the tests of wan/.

The folder is in the real diffusers layout.
"""

import fnmatch
import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from huggingface_hub.utils import EntryNotFoundError, SafetensorsFileMetadata, TensorInfo
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

from wan import codec, weights

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]  # umT5's first ids
WORDS = """
a the of and in on with moves moving across slowly quickly over under behind from left right top
bottom to up down small large bright dark red green blue yellow white black grey orange square
circle triangle ball box background camera static shot street sky night day light soft morning cat
dog car bird water tree grass is are it while then
""".split()


def write_wan_folder(path, seed=0):
    """Writes all of a Wan2.1 in the diffusers layout; returns its Path.

    transformer/, vae/ (strides 4, 8, 8; 16 channels), text_encoder/ (width 32), tokenizer/,
    scheduler/ and model_index.json.
    """
    path = Path(path)
    tokenizer = write_tokenizer(path / "tokenizer")
    vocab_size = 16 * math.ceil(
        (tokenizer.get_vocab_size() + 1) / 16
    )  # as umT5, whose embedding has a few rows more than there are tokens
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    umt5 = UMT5Config(vocab_size=vocab_size, **sizes)
    parts = {
        "transformer": WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=64,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=64,
        ),
        "vae": AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1),
        "text_encoder": UMT5EncoderModel(umt5),
    }
    for i, (name, module) in enumerate(parts.items()):
        randomise(module, seed + i).save_pretrained(path / name)
    # as the real one, which has shared.weight alone all the same
    config = path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(path / "scheduler")
    index = {name: ["diffusers", type(parts[name]).__name__] for name in ("transformer", "vae")}
    index |= {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
    }
    index |= {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.33.0",
    }
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def randomise(module, seed):
    """Makes every tensor random and not zero.

    Outputs of linears and convolutions have a deviation of about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            r = torch.randn(p.shape, generator=generator)
            gain = "norm" in name and name.endswith(("gamma", "weight"))
            p.copy_(
                1 + 0.2 * r
                if gain
                else 0.2 * r
                if name.endswith("bias")
                else r / p[0].numel() ** 0.5
            )
    return module.eval().requires_grad_(False)


def write_tokenizer(folder):
    """Writes a Unigram tokenizer like umT5's, of whole words and single ASCII characters.

    A few ids at its end are in no text.
    """
    characters = ["▁"] + [chr(i) for i in range(33, 127)]
    vocab = (
        [(token, 0.0) for token in SPECIAL]
        + [("▁" + word, -4.0) for word in WORDS]
        + [(c, -8.0) for c in characters]
    )
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(SPECIAL + [f"<extra_id_{i}>" for i in range(3)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(names | dict(tokenizer_class="T5Tokenizer", model_max_length=512, extra_ids=0))
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return tokenizer


def write_clip(path, frames=20, size=(48, 64), fps=24, kind=None, seed=0):
    """Writes a video of a bright square that moves to the right.

    size: rows, columns; kind: "mp4", "mov", "webm" or "gif" (default: path's ending).
    """
    path, (h, w) = Path(path), size
    kind = kind or path.suffix[1:]
    codec, pixels = {"webm": ("libvpx-vp9", "yuv420p"), "gif": ("gif", "rgb8")}.get(
        kind, ("libx264", "yuv420p")
    )
    rng = np.random.default_rng(seed)
    background, colour, side = (
        rng.integers(0, 80, 3),
        rng.integers(150, 256, 3),
        max(2, min(h, w) // 3),
    )
    with av.open(str(path), "w", format=kind) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = h, w, pixels
        for i in range(frames):
            picture = np.broadcast_to(background, (h, w, 3)).astype(np.uint8)
            left, top = (w - side) * i // max(1, frames - 1), (h - side) // 2
            picture[top : top + side, left : left + side] = colour
            file.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
                )
            )
        file.mux(stream.encode())
    return path


def fake_hub(root, monkeypatch):
    """Makes the folders root/OWNER/NAME the hub's repositories.

    Returns the set of what was asked for: names of files, "header of NAME".
    """
    fetched = set()

    def snapshot_download(repo, allow_patterns):
        cache = root / "cache" / repo  # it does not exist where nothing ever matched
        for f in (f for f in (root / repo).rglob("*") if f.is_file()):
            name = str(f.relative_to(root / repo))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.add(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f, cache / name)
        return str(cache)

    def parse_safetensors_file_metadata(repo, name):
        if not (root / repo / name).is_file():
            raise EntryNotFoundError(f"404: no {name} in {repo}")
        fetched.add(f"header of {name}")
        with safe_open(root / repo / name, "pt") as file:
            return SafetensorsFileMetadata(
                {},
                {
                    key: TensorInfo("F32", file.get_slice(key).get_shape(), (0, 0))
                    for key in file.keys()
                },
            )

    for module in (codec, weights):
        monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(weights, "parse_safetensors_file_metadata", parse_safetensors_file_metadata)
    return fetched
