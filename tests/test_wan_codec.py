"""wan/codec.py on a tiny random Wan: against diffusers, transformers and closed forms."""

import importlib
import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

for module in ("diffusers", "transformers", "ftfy"):
    pytest.importorskip(
        module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
    )

import tokenizers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tiny_wan import write_wan_folder
from transformers import AutoTokenizer, UMT5EncoderModel

from wan import codec as module
from wan.codec import Codec, PromptEncoder, Tokenizer, clean

pytestmark = pytest.mark.slow

VAE_CONFIG, UMT5_CONFIG = "vae/config.json", "text_encoder/config.json"
VAE, UMT5, WORDS = (
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)
TEXTS = [
    "a red square moves slowly across the sky",
    "",
    "night",
    'the small dog, 3 cats & a bird: "under the tree" at 7.30 [static shot]',
]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def vae(wan):
    return AutoencoderKLWan.from_pretrained(wan / "vae", low_cpu_mem_usage=False).requires_grad_(
        False
    )


@pytest.fixture(scope="module")
def umt5(wan):
    umt5 = UMT5EncoderModel.from_pretrained(wan / "text_encoder").requires_grad_(False)
    umt5.encoder.set_input_embeddings(umt5.shared)  # transformers 5.0 does so only where tied
    return umt5


@pytest.fixture(scope="module")
def codec(wan):
    return Codec(wan)


@pytest.fixture(scope="module")
def encoder(wan):
    return PromptEncoder(wan, length=96)


@pytest.fixture
def copy(wan, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(wan, tmp_path / "copy")


def clip(*size, seed=0):
    """Smooth random frames (B, 3, T, H, W) that fill [-1, 1]."""
    coarse = torch.randn(
        *size[:3],
        *(max(2, s // 8) for s in size[3:]),
        generator=torch.Generator().manual_seed(seed),
    )
    frames = torch.nn.functional.interpolate(
        coarse.flatten(0, 1), size[3:], mode="bicubic"
    ).unflatten(0, size[:2])
    return frames / frames.abs().max()


def statistics(folder):
    """(C, 1, 1, 1) float64 mean and deviation of the latents, as the VAE's config has them."""
    config = json.loads((folder / "vae/config.json").read_text())
    return (
        torch.tensor(config[name], dtype=torch.float64).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )


# ---------------------------------------------------------------- video


def test_z_v_is_the_posteriors_mean_normalised_per_channel(wan, vae, codec):
    frames, (mean, std) = clip(2, 3, 9, 32, 48), statistics(wan)
    assert len(set(mean.flatten().tolist())) == len(set(std.flatten().tolist())) == 16
    posterior = vae.encode(frames).latent_dist
    z_v = codec.encode(frames)
    assert (
        z_v.shape == (2, *codec.latent_shape(9, 32, 48)) == (2, 16, 3, 4, 6)
        and z_v.dtype == torch.float32
    )
    assert (
        posterior.std.min() > 0.1
        and (z_v - (posterior.mean.double() - mean) / std).abs().max() < 1e-6
    )
    assert torch.equal(codec.encode(frames), z_v)
    assert torch.equal(Codec(wan, latents="raw").encode(frames), posterior.mean)


def test_decode_is_diffusers_on_the_latents_as_its_vae_wants_them(wan, vae, codec):
    mean, std = statistics(wan)
    z_v = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    frames = codec.decode(z_v)
    wanted = vae.decode((z_v.double() * std + mean).float()).sample
    assert frames.shape == (2, 3, 9, 32, 48) and frames.dtype == torch.float32
    assert (frames - wanted).abs().max() < 1e-5 and 0.1 < frames.std() and frames.abs().max() <= 1
    raw = Codec(wan, latents="raw")
    assert torch.equal(raw.decode(z_v), vae.decode(z_v).sample)
    x = clip(1, 3, 5, 32, 32)
    assert (codec.decode(codec.encode(x)) - raw.decode(raw.encode(x))).abs().max() < 1e-4


def test_one_clip_of_a_batch_is_coded_as_alone(codec):
    frames = clip(3, 3, 5, 32, 32)
    together = codec.encode(frames)
    assert all(
        (codec.encode(frames[i : i + 1])[0] - together[i]).abs().max() < 1e-4 for i in range(3)
    )
    assert (codec.decode(together)[1:2] - codec.decode(together[1:2])).abs().max() < 1e-4


@pytest.mark.parametrize(
    "size, wanted",
    [
        ((1, 16, 16), (16, 1, 2, 2)),
        ((5, 32, 48), (16, 2, 4, 6)),
        ((81, 480, 832), (16, 21, 60, 104)),
    ],
)
def test_latent_shapes_are_wans(codec, size, wanted):
    assert codec.latent_shape(*size) == wanted


@pytest.mark.parametrize(
    "size, words",
    [
        ((0, 16, 16), "0 frames 4n + 1"),
        ((4, 16, 16), "4 frames 4n + 1"),
        ((80, 480, 832), "80 frames"),
        ((-3, 16, 16), "-3 frames"),
        ((5, 24, 32), "24 x 32 multiples of 16"),
        ((5, 32, 40), "32 x 40 multiples of 16"),
        ((5, 0, 16), "0 x 16"),
        ((5, 16, -16), "16 x -16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(codec, size, words):
    for call in (
        (lambda: codec.latent_shape(*size), lambda: codec.encode(torch.zeros(1, 3, *size)))
        if min(size) >= 0
        else (lambda: codec.latent_shape(*size),)
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words.split()), error.value


@pytest.mark.parametrize(
    "frames, words",
    [
        (torch.zeros(3, 5, 16, 16), "(3, 5, 16, 16) (B, 3, T, H, W)"),
        (torch.zeros(1, 4, 5, 16, 16), "(1, 4, 5, 16, 16)"),
        (torch.zeros(0, 3, 5, 16, 16), "(0, 3"),
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), "uint8 floats"),
        (torch.full((1, 3, 5, 16, 16), 255.0), "255 [-1, 1]"),
        (torch.zeros(1, 3, 5, 16, 16).index_fill(2, torch.tensor(3), torch.nan), "nan [-1, 1]"),
    ],
)
def test_frames_of_another_shape_or_range_are_refused(codec, frames, words):
    with pytest.raises(ValueError) as error:
        codec.encode(frames)
    assert all(word in str(error.value) for word in words.split()), error.value


def test_latents_of_another_shape_or_with_nan_are_refused(codec):
    for z_v, word in (
        (torch.zeros(16, 2, 4, 4), "(16, 2, 4, 4)"),
        (torch.zeros(1, 12, 2, 4, 4), "(1, 12"),
        (torch.zeros(1, 16, 0, 4, 4), "(1, 16, 0"),
        (torch.full((1, 16, 2, 4, 4), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            codec.decode(z_v)


def test_tiles_give_nearly_the_same(copy):
    """Only what lies near a tile's edge differs.

    Without the attention, that is, which sees all of a tile and at random weights minds it.
    """
    tensors = load_file(copy / VAE)
    save_file(
        {name: tensor * ("attentions" not in name) for name, tensor in tensors.items()},
        copy / VAE,
        metadata={"format": "pt"},
    )
    codec, tiled, frames = Codec(copy), Codec(copy, tiling=True), clip(1, 3, 1, 272, 288)
    for call, x in ((Codec.encode, frames), (Codec.decode, codec.encode(frames))):
        whole, parts = call(codec, x), call(tiled, x)
        assert parts.shape == whole.shape and not torch.equal(parts, whole)
        assert (parts - whole).std() < 0.05 * whole.std()
    assert torch.equal(tiled.encode(frames[..., :32, :32]), codec.encode(frames[..., :32, :32]))


def test_umt5_reads_its_prompt_by_the_one_embedding_that_its_file_has(wan):
    """As the real one, whose config says that none is tied."""
    config = json.loads((wan / UMT5_CONFIG).read_text())
    stored, umt5 = load_file(wan / UMT5), PromptEncoder(wan).umt5
    assert config["tie_word_embeddings"] is False and "encoder.embed_tokens.weight" not in stored
    assert torch.equal(umt5.encoder.embed_tokens.weight, stored["shared.weight"])


def test_autocast_around_it_changes_nothing(codec, encoder):
    frames = clip(1, 3, 5, 16, 16)
    z_v, c = codec.encode(frames), encoder(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(frames), z_v) and torch.equal(encoder(TEXTS), c)


def test_with_offload_a_module_comes_for_the_call_and_goes_after_it(wan, monkeypatch):
    codec, encoder = Codec(wan, offload=True), PromptEncoder(wan, offload=True)
    for part, first, call in (
        (codec.vae, codec.vae.quant_conv, lambda: codec.encode(clip(1, 3, 1, 16, 16))),
        (codec.vae, codec.vae.post_quant_conv, lambda: codec.decode(torch.zeros(1, 16, 1, 2, 2))),
        (encoder.umt5, encoder.umt5.encoder, lambda: encoder(TEXTS)),
    ):
        log = []
        monkeypatch.setattr(part, "to", lambda device: log.append(str(device)))
        first.register_forward_hook(lambda *_: log.append("at work"))
        call()
        assert log == ["cpu", "at work", "cpu"]
    codec.offload, log = False, []
    monkeypatch.setattr(codec.vae, "to", lambda device: log.append(str(device)))
    codec.encode(clip(1, 3, 1, 16, 16))
    assert log == ["cpu", "at work"]


# ---------------------------------------------------------------- prompts


def test_c_is_umt5_on_the_trimmed_text_then_zeros(encoder, umt5):
    c = encoder(TEXTS)
    assert c.shape == (4, 96, 32) == (4, encoder.length, encoder.width) and c.dtype == torch.float32
    for i, text in enumerate(TEXTS):
        ids = encoder.tokenizer.ids(text)
        n, alone = len(ids), umt5(torch.tensor([ids])).last_hidden_state[0]
        assert (c[i, :n] - alone).abs().max() < 1e-5 and alone.std() > 0.3
        assert not c[i, n:].any()
        assert (encoder([text])[0] - c[i]).abs().max() < 1e-5


def test_c_is_what_diffusers_pipeline_gives(wan, vae, umt5, encoder):
    tokenizer, scheduler = (
        AutoTokenizer.from_pretrained(wan / "tokenizer"),
        UniPCMultistepScheduler.from_pretrained(wan / "scheduler"),
    )
    texts = [*TEXTS, "  a   bird\n&amp;amp; a cat "]
    wanted, _ = WanPipeline(tokenizer, umt5, vae, scheduler).encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=96
    )
    assert (encoder(texts) - wanted).abs().max() < 1e-5


def test_c_in_bf16_is_close_and_float32(wan, encoder):
    c = PromptEncoder(wan, dtype=torch.bfloat16, length=96)(TEXTS)
    assert (
        c.dtype == torch.float32
        and 0 < (c - encoder(TEXTS)).square().mean().sqrt() < 0.03 * c.square().mean().sqrt()
    )


def test_prompts_that_do_not_fit_are_refused(encoder):
    fits, over = "sky " * 95, "sky " * 96
    assert [len(encoder.tokenizer.ids(text)) for text in (fits, over)] == [96, 97] and encoder(
        [fits]
    )[0].abs().sum(1).min() > 0
    for texts, word in (
        ([over], "97 tokens with EOS, wanted at most 96"),
        ("a sky", "list of strings"),
        ([], "list of strings"),
        ([3], "wanted a string"),
    ):
        with pytest.raises(ValueError, match=word):
            encoder(texts)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("  a\t b\n\nc  ", "a b c"),
        ("", ""),
        (" \n", ""),
        ("caf\u00c3\u00a9", "café"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("<i> &amp;amp;quot;", "<i> &quot;"),
        ("<i> &amp;quot;", '<i> "'),
        ("\u201cquoted\u201d \u2018it\u2019s\u2019", "\"quoted\" 'it's'"),
        ("wide\u3000space\u00a0here", "wide space here"),
        ("ﬁne", "fine"),
        ("一只猫。", "一只猫。"),
    ],
)
def test_texts_are_cleaned_as_diffusers_does(text, wanted):
    assert clean(text) == wanted == prompt_clean(text)


# ---------------------------------------------------------------- tokens


def test_a_text_comes_back_from_its_tokens(wan):
    tokenizer = Tokenizer(wan, length=100)
    y = tokenizer.encode(TEXTS)
    assert y.shape == (4, 100) and y.dtype == torch.int64 and tokenizer.decode(y) == TEXTS
    for row, text in zip(y.tolist(), TEXTS):
        ids = tokenizer.ids(text)
        assert row == ids + [0] * (100 - len(ids)) and ids[-1] == 1 and not {0, 1} & set(ids[:-1])
    assert tokenizer.decode(tokenizer.encode(["  a   dog&amp;cat\n"])) == ["a dog&cat"]
    assert len(tokenizer) == 1 + max(tokenizer.umt5.get_vocab().values())


def test_ids_are_transformers_tokenizers(wan):
    tokenizer, peer = Tokenizer(wan), AutoTokenizer.from_pretrained(wan / "tokenizer")
    assert [tokenizer.ids(text) for text in TEXTS] == peer(TEXTS).input_ids


def test_decoding_stops_at_the_first_eos_and_drops_padding(wan):
    tokenizer = Tokenizer(wan)
    a, dog = tokenizer.ids("a dog")[:2]
    y = torch.tensor([[a, dog, 1, a, a], [a, dog, 0, 0, 0], [1, a, a, a, a], [a, a, a, a, dog]])
    assert tokenizer.decode(y) == ["a dog", "a dog", "", "a a a a dog"]
    for y, word in (
        (torch.tensor([[len(tokenizer)]]), f"wanted 0..{len(tokenizer) - 1}"),
        (torch.tensor([[-1]]), "-1"),
        (torch.tensor([a, dog]), r"\(B, N\)"),
    ):
        with pytest.raises(ValueError, match=word):
            tokenizer.decode(y)


def test_a_restricted_vocabulary_is_counted_through(wan):
    whole = Tokenizer(wan)
    vocabulary = sorted({0, 1}.union(*(whole.ids(text) for text in TEXTS)))
    tokenizer = Tokenizer(wan, length=100, vocabulary=vocabulary)
    y = tokenizer.encode(TEXTS)
    assert (
        len(tokenizer) == len(vocabulary) < len(whole)
        and y.max() < len(vocabulary)
        and tokenizer.decode(y) == TEXTS
    )
    assert [vocabulary[i] for i in y[0].tolist()] == whole.ids(TEXTS[0]) + [0] * (
        100 - len(whole.ids(TEXTS[0]))
    )
    with pytest.raises(ValueError) as error:
        tokenizer.encode(["a dog", "a yellow dog behind a yellow car"])
    assert all(
        word in str(error.value)
        for word in (f"vocabulary of {len(vocabulary)}: ▁yellow ▁behind ▁car;", "a yellow dog")
    )


@pytest.mark.parametrize(
    "vocabulary", [[], [1, 5], [0, 5], [0, 1, 7, 5], [0, 1, 5, 5], [0, 1, 10**6], [-1, 0, 1]]
)
def test_a_vocabulary_that_is_none_is_refused(wan, vocabulary):
    with pytest.raises(ValueError, match=f"vocabulary has {len(vocabulary)} ids"):
        Tokenizer(wan, vocabulary=vocabulary)


def test_texts_that_do_not_fit_are_refused(wan):
    tokenizer = Tokenizer(wan, length=4)
    assert tokenizer.encode(["sky sky sky", "sky sky sky sky"])[:, -1].tolist() == [
        1,
        tokenizer.ids("sky")[0],
    ]  # N tokens leave EOS no room
    for texts, word in (
        (["sky", "sky " * 5], "5 tokens, wanted at most 4: 'sky sky"),
        (["sky </s> sky"], "spells"),
        (["<pad>"], "spells"),
        ([None], "None"),
        ("sky", "list of strings"),
        ([], "list of strings"),
    ):
        with pytest.raises(ValueError, match=word):
            tokenizer.encode(texts)


# ---------------------------------------------------------------- fingerprints


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(path):
    tensors = load_file(path)
    name = max(tensors)
    tensors[name].flatten()[-1] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def test_fingerprints_are_of_config_and_weights_and_nothing_else(wan, copy, tmp_path):
    codec, encoder = Codec(wan, latents="raw").fingerprint, PromptEncoder(wan, length=7).fingerprint
    assert len(codec) == len(encoder) == 16 and int(codec, 16) != int(encoder, 16)
    assert (
        codec == Codec(copy, dtype=torch.bfloat16).fingerprint
        and encoder == PromptEncoder(str(copy), dtype=torch.bfloat16).fingerprint
    )
    assert codec != Codec(write_wan_folder(tmp_path / "other", seed=5)).fingerprint
    edit_json(copy / "vae/config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    umt5 = UMT5EncoderModel.from_pretrained(copy / "text_encoder", tie_word_embeddings=True)
    (copy / "text_encoder/model.safetensors").unlink()
    umt5.save_pretrained(copy / "text_encoder", max_shard_size="40KB")
    edit_json(
        copy / "text_encoder/config.json",
        transformers_version="4.0",
        torch_dtype="float16",
        dtype="float16",
        tie_word_embeddings=False,  # which newer ones overrule
    )
    assert len(list((copy / "text_encoder").glob("*.safetensors"))) > 1
    assert codec == Codec(copy).fingerprint and encoder == PromptEncoder(copy).fingerprint


@pytest.mark.parametrize(
    "part, change",
    [
        (Codec, lambda f: edit_weight(f / VAE)),
        (Codec, lambda f: edit_json(f / VAE_CONFIG, latents_std=[2.0] * 16)),
        (PromptEncoder, lambda f: edit_weight(f / UMT5)),
        (PromptEncoder, lambda f: edit_json(f / UMT5_CONFIG, dropout_rate=0.2)),
        (
            PromptEncoder,
            lambda f: (f / WORDS).write_text((f / WORDS).read_text().replace("-4.0", "-4.5")),
        ),
    ],
    ids=["VAE's weights", "VAE's config", "umT5's weights", "umT5's config", "tokenizer"],
)
def test_fingerprints_change_with_what_they_stand_for(copy, part, change):
    before = part(copy).fingerprint
    change(copy)
    assert part(copy).fingerprint != before


# ---------------------------------------------------------------- damaged folders


def drop_tensor(path):
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


def add_tokens(path):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save(str(path))


def poison(path):
    tensors = load_file(path)
    save_file(
        {name: tensor * torch.nan for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGE = [
    (Codec, lambda f: shutil.rmtree(f / "vae"), "no folder vae wanted diffusers"),
    (PromptEncoder, lambda f: shutil.rmtree(f / "text_encoder"), "no folder text_encoder"),
    (Tokenizer, lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer"),
    (PromptEncoder, lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer"),
    (Codec, lambda f: (f / VAE).unlink(), "vae lacks diffusion_pytorch_model.safetensors"),
    (Codec, lambda f: os.truncate(f / VAE, 9999), VAE + " cannot be read"),
    (Codec, lambda f: os.truncate(f / VAE, 0), VAE + " cannot be read"),
    (Codec, lambda f: (f / VAE_CONFIG).unlink(), "vae lacks config.json"),
    (Codec, lambda f: (f / VAE_CONFIG).write_text("{"), "vae"),
    (Codec, lambda f: edit_json(f / VAE_CONFIG, base_dim=8), "vae AutoencoderKLWan"),
    (Codec, lambda f: drop_tensor(f / VAE), "vae missing keys"),
    (Codec, lambda f: edit_json(f / VAE_CONFIG, latents_mean=[0.0]), "latents_mean wanted 16"),
    (Codec, lambda f: edit_json(f / VAE_CONFIG, latents_std=[0.0] * 16), "latents_std above 0"),
    *(
        (Codec, lambda f, other=other: AutoencoderKLWan(**other).save_pretrained(f / "vae"), words)
        for other, words in (
            (
                dict(base_dim=4, temperal_downsample=[False, False, True]),
                "2 frames of 8 x 8 wanted",
            ),
            (
                dict(base_dim=4, dim_mult=[1, 2, 4], temperal_downsample=[True, True]),
                "4 x 4 wanted",
            ),
            (
                dict(base_dim=4, patch_size=2, in_channels=12, out_channels=12),
                "16 x 16 pixels 5B Wan2.2",
            ),
            (dict(base_dim=4, z_dim=6, latents_mean=[0] * 6, latents_std=[1] * 6), "6 channels 16"),
        )
    ),
    (
        Codec,
        lambda f: edit_json(f / VAE_CONFIG, _class_name="AutoencoderKLQwenImage"),
        "AutoencoderKLQwenImage wanted AutoencoderKLWan",
    ),
    (
        PromptEncoder,
        lambda f: edit_json(f / UMT5_CONFIG, architectures=["T5EncoderModel"]),
        "T5EncoderModel wanted UMT5EncoderModel",
    ),
    (Codec, lambda f: (f / VAE).write_text(POINTER), VAE + " git-lfs pointer"),
    (Tokenizer, lambda f: (f / WORDS).write_text(POINTER), WORDS + " git-lfs pointer"),
    (PromptEncoder, lambda f: (f / UMT5).unlink(), "text_encoder lacks model.safetensors"),
    (PromptEncoder, lambda f: os.truncate(f / UMT5, 50000), UMT5 + " cannot be read"),
    (PromptEncoder, lambda f: drop_tensor(f / UMT5), "text_encoder missing keys shared.weight"),
    (PromptEncoder, lambda f: edit_json(f / UMT5_CONFIG, d_ff=64), "text_encoder UMT5EncoderModel"),
    (
        PromptEncoder,
        lambda f: add_tokens(f / WORDS),
        "text_encoder knows tokens but its tokenizer has",
    ),
    (Tokenizer, lambda f: (f / WORDS).unlink(), "tokenizer lacks tokenizer.json"),
    (Tokenizer, lambda f: os.truncate(f / WORDS, 500), WORDS + " cannot be read"),
    (
        Tokenizer,
        lambda f: (f / WORDS).write_text((f / WORDS).read_text().replace("<pad>", "<nil>")),
        WORDS + " <pad> None wanted 0",
    ),
]


@pytest.mark.parametrize("part, damage, words", DAMAGE)
def test_a_missing_or_damaged_part_is_one_error_that_names_it(copy, part, damage, words):
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        part(copy)
    assert all(
        word in str(error.value) for word in (str(copy), *words.split())
    ) and "\n" not in str(error.value), error.value


def test_weights_that_are_nan_are_noticed_when_they_are_used(copy):
    poison(copy / VAE), poison(copy / UMT5)
    for call, part in (
        (lambda: Codec(copy).encode(clip(1, 3, 5, 16, 16)), "vae"),
        (lambda: Codec(copy).decode(torch.zeros(1, 16, 2, 2, 2)), "vae"),
        (lambda: PromptEncoder(copy)(TEXTS), "text_encoder"),
    ):
        with pytest.raises(ValueError, match=f"{copy / part} gives values that are not finite"):
            call()


def test_what_is_no_path_is_a_repository_of_which_one_part_is_downloaded(wan, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(wan),
    )
    text = Tokenizer("someone/wan").decode(Tokenizer(wan).encode(["a dog"]))
    assert text == ["a dog"] and asked == [
        ("someone/wan", ["tokenizer/*.json", "tokenizer/*.safetensors"])
    ]
    Codec("someone/wan")
    assert asked[1:] == [("someone/wan", ["vae/*.json", "vae/*.safetensors"])]


def test_what_is_neither_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("someone/no-such-wan", "/no/such/folder", "no such name"):
        with pytest.raises(FileNotFoundError) as error:
            Codec(name)
        assert (
            name in str(error.value)
            and "neither here nor on the hub" in str(error.value)
            and "\n" not in str(error.value)
        )


@pytest.mark.parametrize("missing", ["diffusers", "transformers", "ftfy", "tokenizers"])
def test_without_the_extras_one_line_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "wan.codec")
    with pytest.raises(
        ModuleNotFoundError,
        match=rf"^{missing} is not installed: pip install -r requirements-wan.txt$",
    ):
        importlib.import_module("wan.codec")


def test_wrong_latents_are_refused(wan):
    with pytest.raises(ValueError, match="latents is 'scaled', wanted one of normalised, raw"):
        Codec(wan, latents="scaled")
