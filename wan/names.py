"""What each layout of a checkpoint calls the model's parameters and its config's values.

Wan's official names are ours. The others are those of diffusers' WanTransformer3DModel and of the
authors' release.
"""

import math
import re

ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

# Ours -> theirs, without .weight and .bias. Note that diffusers calls norm3 norm2.
DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    **{f"blocks.*.self_attn.{our}": f"blocks.*.attn1.{their}" for our, their in ATTENTION.items()},
    **{f"blocks.*.cross_attn.{our}": f"blocks.*.attn2.{their}" for our, their in ATTENTION.items()},
    "blocks.*.norm3": "blocks.*.norm2",
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
PUBLISHED = DIFFUSERS | {
    "text_embedding.0": "cond_text_embedder.linear_1",
    "text_embedding.2": "cond_text_embedder.linear_2",
    "time_embedding.0": "time_embedding_v.time_embedder.linear_1",
    "time_embedding.2": "time_embedding_v.time_embedder.linear_2",
    "time_embedding_t.0": "time_embedding_t.time_embedder.linear_1",
    "time_embedding_t.2": "time_embedding_t.time_embedder.linear_2",
    "time_projection.1": "time_embedding_v.time_proj",
    "time_projection_t.1": "time_embedding_t.time_proj",
    "head.modulation": "scale_shift_table_v",
    "head.head": "video_head.proj_out",
    "head_t.modulation": "scale_shift_table_t",
    "head_t.norm": "text_head.norm_final",
    "head_t.head": "text_head.linear",
    "token_embedding": "vocab_embed",
    "inv_freq": "rotary_emb_text.inv_freq",
    "blocks.*.ffn_t.0": "blocks.*.ffn_t.net.0.proj",
    "blocks.*.ffn_t.2": "blocks.*.ffn_t.net.2",
}
NAMES = {
    "official": {name: name for name in DIFFUSERS},
    "diffusers": DIFFUSERS,
    "published": PUBLISHED,
}

CLASSES = {"official": "WanModel", "diffusers": "WanTransformer3DModel"}

# Field of Config -> key of config.json. Of diffusers, dim is heads times attention_head_dim; the
# official file leaves out patch_size and prompt_dim.
CONFIG_KEYS = {
    "official": {
        "dim": "dim",
        "ffn_dim": "ffn_dim",
        "eps": "eps",
        "freq_dim": "freq_dim",
        "in_dim": "in_dim",
        "out_dim": "out_dim",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "prompt_len": "text_len",
    },
    "diffusers": {
        "ffn_dim": "ffn_dim",
        "eps": "eps",
        "freq_dim": "freq_dim",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "num_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "patch_size": "patch_size",
        "prompt_dim": "text_dim",
    },
}
CONFIG_FIXED = {
    "official": {"_diffusers_version": "0.30.0", "model_type": "t2v"},
    "diffusers": {
        "_diffusers_version": "0.33.0",
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        "rope_max_seq_len": 1024,
    },
}

# Where Wan's code has a choice, what our model is: key of config.json -> values that fit it.
SUPPORTED = {
    "model_type": ("t2v",),
    "qk_norm": ("rms_norm_across_heads", True),
    "cross_attn_norm": (True,),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
}

# Field of Config -> the tensor and the axis whose size it is, for files without a config.
SIZES = {
    "dim": ("token_embedding.weight", 1),
    "vocab_size": ("token_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "prompt_dim": ("text_embedding.0.weight", 1),
    "freq_dim": ("time_embedding.0.weight", 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0),
    "text_ffn_dim": ("blocks.0.ffn_t.0.weight", 0),
}


def rename(name, table):
    """A parameter's name by a table of stems, its block's number kept; None where it has none."""
    block, stem, leaf = split(name)
    new = table.get(stem)
    return new and new.replace("blocks.*.", block) + leaf


def split(name):
    """blocks.3.ffn.0.weight -> blocks.3., blocks.*.ffn.0 and .weight; "" for what is absent."""
    parts = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL)
    block, stem, leaf = parts.groups(default="")
    return block, "blocks.*." * bool(block) + stem, leaf


def our_name(name, layout):
    """A layout's name of a parameter as ours; None where the layout does not have that name."""
    if layout not in NAMES:
        return name
    return rename(name, {theirs: ours for ours, theirs in NAMES[layout].items()})


def their_name(name, layout):
    """Our name of a parameter as the layout's; ours where it has none."""
    return rename(name, NAMES[layout]) or name if layout in NAMES else name


def sizes_of(shapes):
    """{our name: shape} -> the fields of Config that the shapes tell.

    What is absent or mis-shaped is left out, to be listed later with all that does not fit.
    """
    known = {
        field: shapes[name][axis]
        for field, (name, axis) in SIZES.items()
        if len(shapes.get(name, ())) > axis
    }
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    known["num_layers"] = len(blocks) or 1
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) == 5 and head:
        known["patch_size"] = patch[2:]
        known["out_dim"] = head[0] // math.prod(patch[2:])
    return known
