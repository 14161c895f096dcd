"""Checkpoints of the real world: load() finds their layout by looking, export() writes the video model back.

    official    Wan2.1 as released: config.json (_class_name WanModel) and diffusion_pytorch_model*.safetensors, maybe sharded
    diffusers   the same with other names (_class_name WanTransformer3DModel), in a folder transformer/ or in the folder itself
    own         what UniViGU.save_pretrained writes: config.json (our Config) and model.safetensors
    published   the authors' Uni-ViGU: one .pth file without a config, its weights under "model"
Names and keys are those of Wan2.1's code, of diffusers' WanTransformer3DModel and of the authors' release.
"""

import json
import math
import pickle
import re
import shutil
from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import nn

from univigu import PRESETS, Config, UniViGU

# Ours -> theirs, without .weight and .bias. Wan's official names are ours; note that diffusers calls norm3 norm2.
DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1", "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1", "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    **{f"blocks.*.{kind}_attn.{ours}": f"blocks.*.attn{i}.{theirs}" for i, kind in ((1, "self"), (2, "cross"))
       for ours, theirs in dict(q="to_q", k="to_k", v="to_v", o="to_out.0", norm_q="norm_q", norm_k="norm_k").items()},
    "blocks.*.norm3": "blocks.*.norm2",
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj", "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "head.modulation": "scale_shift_table", "head.head": "proj_out",
}
PUBLISHED = DIFFUSERS | {
    "text_embedding.0": "cond_text_embedder.linear_1", "text_embedding.2": "cond_text_embedder.linear_2",
    **{f"time_embedding{ours}.{i}": f"time_embedding_{m}.time_embedder.linear_{j}" for ours, m in (("", "v"), ("_t", "t")) for i, j in ((0, 1), (2, 2))},
    "time_projection.1": "time_embedding_v.time_proj", "time_projection_t.1": "time_embedding_t.time_proj",
    "head.modulation": "scale_shift_table_v", "head.head": "video_head.proj_out",
    "head_t.modulation": "scale_shift_table_t", "head_t.norm": "text_head.norm_final", "head_t.head": "text_head.linear",
    "token_embedding": "vocab_embed", "inv_freq": "rotary_emb_text.inv_freq",
    "blocks.*.ffn_t.0": "blocks.*.ffn_t.net.0.proj", "blocks.*.ffn_t.2": "blocks.*.ffn_t.net.2",
}
NAMES = {"official": {name: name for name in DIFFUSERS}, "diffusers": DIFFUSERS, "published": PUBLISHED}

CLASSES = {"official": "WanModel", "diffusers": "WanTransformer3DModel"}
# Config field -> key of config.json; diffusers gives dim as heads times head width, the official file leaves patch_size and prompt_dim out.
CONFIG_KEYS = {
    "official": {name: name for name in ("dim", "ffn_dim", "eps", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers")} | {"prompt_len": "text_len"},
    "diffusers": {"ffn_dim": "ffn_dim", "eps": "eps", "freq_dim": "freq_dim", "in_dim": "in_channels", "out_dim": "out_channels",
                  "num_heads": "num_attention_heads", "num_layers": "num_layers", "patch_size": "patch_size", "prompt_dim": "text_dim"},
}
CONFIG_FIXED = {"official": dict(_diffusers_version="0.30.0", model_type="t2v"),
                "diffusers": dict(_diffusers_version="0.33.0", qk_norm="rms_norm_across_heads", cross_attn_norm=True, rope_max_seq_len=1024)}
# What our model is, where Wan's code has a choice: key of config.json -> values that we have.
SUPPORTED = dict(model_type=("t2v",), qk_norm=("rms_norm_across_heads", True), cross_attn_norm=(True,), image_dim=(None,),
                 added_kv_proj_dim=(None,), pos_embed_seq_len=(None,))
# Config field -> the tensor and the axis that tell it, for files without a config.
SIZES = dict(dim=("token_embedding.weight", 1), vocab_size=("token_embedding.weight", 0), in_dim=("patch_embedding.weight", 1),
             prompt_dim=("text_embedding.0.weight", 1), freq_dim=("time_embedding.0.weight", 1), ffn_dim=("blocks.0.ffn.0.weight", 0),
             text_ffn_dim=("blocks.0.ffn_t.0.weight", 0))
WEIGHTS = "diffusion_pytorch_model"
SHARD = "5GB"


def load(path_or_hub_id, *, base=None, dtype=torch.float32, device="cpu", **overrides):
    """A checkpoint in any of the four layouts -> UniViGU on `device`, every parameter in `dtype`. Memory peaks at about one copy.

    path_or_hub_id: a folder, a .pth file, or a repository of the hub. A Wan2.1 checkpoint gets a new text stream, whose parameters
    are listed on stdout; its sizes are those of PRESETS["wan-1.3b"] (text_ffn_dim: dim). base: the Wan2.1 checkpoint, path or hub id,
    that supplies what a published .pth lacks of the video model. overrides: Config fields that the checkpoint does not decide.
    Raises FileNotFoundError where there is no checkpoint, ValueError for one that is damaged, holds more than tensors, is no
    text-to-video Wan, or does not fit: then missing, unexpected and mis-shaped tensors are listed by name. (Of a .pth, the system
    also keeps the file's pages in memory, as long as nothing else needs it.)
    """
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"dtype is {dtype!r}, wanted a floating-point torch.dtype")
    layout, where, tensors, unexpected, config = look(path_or_hub_id, base, overrides)
    with torch.device("meta"):
        model = UniViGU(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new = [name for name in wanted if layout in CLASSES and UniViGU.is_text(name)]
    check(layout, where, {name: shape for name, (shape, _) in tensors.items()}, wanted, new, unexpected)

    for name in new:
        place(model, name, torch.empty(wanted[name], dtype=dtype, device=device))
    model.init_weights()                                            # does nothing on the meta device: what will be loaded stays unmade
    for name, (_, read) in tensors.items():
        tensor = read().to(device, dtype, copy=True)                # a copy: the file may change or go while the model lives
        if not all(x.isfinite() for x in tensor.aminmax()):
            raise ValueError(f"{where}: {theirs(name, layout)} holds NaN or infinity in {dtype}")
        place(model, name, tensor)
    if new:
        model.start_text()
    counts = Counter()
    for name in new:
        counts[re.sub(r"\d+", "*", re.match(r"(blocks\.\d+\.)?\w+", name)[0])] += math.prod(wanted[name])
    for name, count in counts.items():
        print(f"new: {name}, {count:,} parameters")
    return model


def export(model, path, layout):
    """Writes the video model, without its text stream, for Wan's own code or for diffusers.

    layout: "official" writes path/config.json and path/diffusion_pytorch_model*.safetensors, "diffusers" the same to path/transformer, in the
    model's dtype and in files of at most 5 GB. Wan's own code has patch_size (1, 2, 2) and prompt_dim 4096 built in; neither layout can
    say latents="raw". An earlier export is replaced; raises ValueError for another layout, and where the folder holds anything else.
    """
    if layout not in CLASSES:
        raise ValueError(f"layout is {layout!r}, wanted one of {', '.join(CLASSES)}")
    folder = Path(path).absolute() / ("transformer" if layout == "diffusers" else "")
    if folder.exists() and not is_export(folder):
        raise ValueError(f"{folder} exists and is no export: wanted a new or empty folder, or one that export() wrote")
    c = model.config
    config = {"_class_name": CLASSES[layout], **CONFIG_FIXED[layout], **{key: getattr(c, name) for name, key in CONFIG_KEYS[layout].items()}}
    if layout == "diffusers":
        config["attention_head_dim"] = c.dim // c.num_heads
    tensors = {rename(name, NAMES[layout]): p.detach() for name, p in model.named_parameters() if not model.is_text(name)}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_torch_state_dict(tensors, part, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=SHARD)
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def config(path_or_hub_id, *, base=None, **overrides):
    """The Config of the model that load() would return, from headers alone. Raises as load(), which also compares names, shapes and values."""
    return look(path_or_hub_id, base, overrides)[-1]


def is_wan(checkpoint):
    """Whether a checkpoint is one of the real world, in a layout of its own or on the hub; else it is a folder of train.py's, or nothing."""
    path = Path(checkpoint)
    if path.is_dir():
        return (path / "transformer").is_dir() or any(path.glob("*.pth")) or any(path.glob(f"{WEIGHTS}*"))
    return path.suffix == ".pth" or not path.exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)))


def layout(path_or_hub_id):
    """The name of a checkpoint's layout: "official", "diffusers", "own" or "published". Raises FileNotFoundError, ValueError where there is none."""
    return find(path_or_hub_id)[0]


# ---------------------------------------------------------------- looking

def look(path_or_hub_id, base, overrides):
    """A checkpoint, unread: its layout, where it is, {our name: (shape, function that reads the tensor)}, names that the layout does not have, Config."""
    if unknown := sorted(set(overrides) - {f.name for f in fields(Config)}):
        raise ValueError(f"unknown overrides {', '.join(unknown)}: wanted fields of Config")
    layout, where = find(path_or_hub_id)
    tensors, unexpected = open_checkpoint(layout, where)
    stems = {re.sub(r"^blocks\.\d+", "blocks.*", name.removesuffix(".weight").removesuffix(".bias")) for name in tensors}
    if base is not None and (layout != "published" or not DIFFUSERS.keys() <= stems):       # else nothing is missing: do not fetch it
        base_layout, base_where = find(base)
        if layout != "published" or base_layout not in CLASSES:
            raise ValueError(f"base {base} is of layout {base_layout}, for a checkpoint of layout {layout}; wanted a Wan2.1 checkpoint for a published one")
        base_tensors, base_unexpected = open_checkpoint(base_layout, base_where)
        tensors, unexpected = base_tensors | tensors, unexpected + base_unexpected
    try:
        return layout, where, tensors, unexpected, make_config(layout, where, tensors, overrides)
    except TypeError as error:
        raise ValueError(f"{where}: a value of its config.json, or an override, has a wrong type: {error}") from None


def find(path_or_hub_id):
    """A path or hub id -> (layout, the folder, or .pth file, that holds the weights)."""
    path = Path(path_or_hub_id)
    path = path if path.exists() else fetch(str(path_or_hub_id))
    if path.is_file():
        if path.suffix != ".pth":
            raise ValueError(f"checkpoint {path} ends in {path.suffix!r}, wanted a folder or a .pth file")
        return "published", path
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    kind = read_json(folder / "config.json").get("_class_name") if (folder / "config.json").is_file() else None
    if kind is not None:
        if kind not in CLASSES.values():
            raise ValueError(f"{folder / 'config.json'} has _class_name {kind!r}, wanted one of {', '.join(CLASSES.values())}")
        return next(layout for layout, name in CLASSES.items() if name == kind), folder
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return "own", folder
    pickles = sorted(folder.rglob("*.pth"))
    if len(pickles) != 1:
        raise FileNotFoundError(f"{path} holds no checkpoint: wanted config.json with its .safetensors, or one .pth file; "
                                f"found {some(sorted(f.name for f in path.iterdir())) or 'nothing'}")
    return "published", pickles[0]


def fetch(hub_id):
    """Downloads what load() needs of a repository of the hub, and nothing else, and returns its folder."""
    try:
        for weights in (f"transformer/{WEIGHTS}*", f"{WEIGHTS}*", "model.safetensors", "*.pth"):     # the last: Wan's VAE and umT5 are .pth too
            folder = Path(snapshot_download(hub_id, allow_patterns=["config.json", "transformer/config.json", "train.json", "world.json", weights]))
            if any(folder.glob("**/" + weights)):
                return folder
    except Exception as error:  # no network, no such name, no permission: each has errors of its own
        raise FileNotFoundError(f"checkpoint {hub_id} is neither here nor on the hub: {type(error).__name__}: {' '.join(str(error).split())}") from None
    raise FileNotFoundError(f"checkpoint {hub_id} is on the hub, but holds no weights of a layout that load() knows")


def open_checkpoint(layout, where):
    """({our name: (shape, function that reads the tensor)}, [names that the layout does not have])."""
    found = open_pth(where) if layout == "published" else open_safetensors(where, "model" if layout == "own" else WEIGHTS)
    table = {theirs: ours for ours, theirs in NAMES[layout].items()} if layout in NAMES else None
    ours = {name: rename(name, table) for name in found}
    return {ours[name]: tensor for name, tensor in found.items() if ours[name]}, [name for name in found if not ours[name]]


def open_safetensors(folder, stem):
    """{name: (shape, read)} of one file, or of all shards that an index JSON names."""
    index = folder / f"{stem}.safetensors.index.json"
    files = sorted(set(read_json(index, "weight_map").values())) if index.is_file() else [f"{stem}.safetensors"]
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {some(absent)}")
    found = {}
    for path in (folder / file for file in files):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: (tuple(file.get_slice(name).get_shape()), partial(read_tensor, path, name)) for name in file.keys()}
        except Exception as error:  # the library's own errors for damaged files
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return found


def read_tensor(path, name):
    """One tensor, mapped from the file. The file is opened for it alone: a mapping that stays would count all that was read so far."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def open_pth(path):
    """{name: (shape, read)} of a published file, without the prefixes that FSDP and torch.compile leave; no pickled code runs."""
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["model"]
        return {re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.", "", name): (tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
                for name, tensor in tensors.items()}
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors, and is not read: what it pickles could run code") from None
    except Exception as error:  # truncated and foreign files fail in many ways
        raise ValueError(f"{path} is not read: wanted torch.save of a dict with tensors by name under 'model', found "
                         f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


# ---------------------------------------------------------------- names and sizes

def check(layout, where, found, wanted, new, unexpected):
    """Raises ValueError unless the tensors found are those wanted, both {our name: shape}, but for the names in `new`."""
    faults = {"missing": [theirs(name, layout) for name in wanted if name not in found and name not in new],
              "unexpected": unexpected + [theirs(name, layout) for name in found if name not in wanted],
              "mis-shaped": [f"{theirs(name, layout)} {shape}, wanted {wanted[name]}" for name, shape in found.items() if wanted.get(name, shape) != shape]}
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in faults.items() if names)
        hint = "; with base= the video model's come from a Wan2.1 checkpoint" if layout == "published" and faults["missing"] else ""
        raise ValueError(f"{where} does not fit the model: {listed}{hint}")


def theirs(name, layout):
    """Our name of a parameter as the layout has it; ours where it has none."""
    return rename(name, NAMES.get(layout)) or name


def rename(name, table):
    """A parameter's name by a table of stems, block numbers kept; None where the table lacks it. No table: as it is."""
    if table is None:
        return name
    block, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups(default="")
    new = table.get("blocks.*." * bool(block) + stem)
    return new and new.replace("blocks.*.", block) + leaf


def make_config(layout, where, tensors, overrides):
    """The Config of a checkpoint: what the checkpoint says, the overrides, and for the rest what PRESETS["wan-1.3b"] has."""
    if layout == "own":
        known, rest = read_json(where / "config.json"), {}
        if unknown := sorted(set(known) - {f.name for f in fields(Config)}):
            raise ValueError(f"{where / 'config.json'} has {', '.join(unknown)}: wanted fields of Config")
    else:
        known, rest = sizes(tensors), asdict(PRESETS["wan-1.3b"])
        if layout == "published":
            known |= published(where, tensors, known.get("dim", rest["dim"]))
            rest["num_heads"] = max(1, known.get("dim", 0) // 128)
        else:
            known |= wan_config(layout, where / "config.json")
            rest["text_ffn_dim"] = known["dim"]
    for name in (name for name in overrides if name in known and not name.startswith("text_")):
        found, wanted = (tuple(value) if name == "patch_size" else value for value in (overrides[name], known[name]))
        if found != wanted:
            raise ValueError(f"{name} is {found!r} among the overrides, but {wanted!r} in {where}")
    return Config(**rest | known | overrides)


def sizes(tensors):
    """The Config fields that shapes tell. What is absent or misshapen is left out here, to be listed with the others later."""
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    known = {field: shapes[name][axis] for field, (name, axis) in SIZES.items() if len(shapes.get(name, ())) > axis}
    known["num_layers"] = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}) or 1
    if len(shapes.get("patch_embedding.weight", ())) == 5 and shapes.get("head.head.weight"):
        known["patch_size"] = shapes["patch_embedding.weight"][2:]
        known["out_dim"] = shapes["head.head.weight"][0] // math.prod(known["patch_size"])
    return known


def wan_config(layout, path):
    """The Config fields in a config.json of Wan's. Raises ValueError for a Wan that our model is not."""
    stored = read_json(path)
    for key, allowed in SUPPORTED.items():
        if stored.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path} has {key} {stored[key]!r}, wanted {allowed[0]!r}: of Wan, only text-to-video is supported")
    keys = CONFIG_KEYS[layout] | (dict(dim="attention_head_dim") if layout == "diffusers" else {})
    if absent := [key for key in keys.values() if key not in stored]:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    known = {name: stored[key] for name, key in keys.items()}
    if layout == "diffusers":
        known["dim"] *= known["num_heads"]
    return known


def published(where, tensors, dim):
    """The Config fields that the published layout implies. Takes the text's rotary frequencies, a buffer, out of `tensors` and checks them."""
    known = dict(text_flow="discrete", text_dim=dim, text_ffn_init="copy", latents="raw")
    if "inv_freq" in tensors:
        found = tensors.pop("inv_freq")[1]().double()
        wanted = 10000 ** -(torch.arange(found.numel(), dtype=torch.float64) / found.numel())
        if found.shape != wanted.shape or not len(found) or not torch.allclose(found, wanted, rtol=0.01):      # it may have been cast to bf16
            raise ValueError(f"{where}: {PUBLISHED['inv_freq']} is not 10000^(-2i / head width)")
        known["num_heads"] = dim // (2 * len(found))
    return known


# ---------------------------------------------------------------- small things

def place(model, name, tensor):
    """Makes `tensor` the parameter `name` of the model."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


def is_export(folder):
    """Whether a folder is empty or holds what export() writes, and nothing else."""
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else [""]
    return not names or ("config.json" in names and all(name == "config.json" or name.startswith(WEIGHTS) for name in names)
                         and read_json(folder / "config.json").get("_class_name") in CLASSES.values())


def read_json(path, key=None):
    """The object in a JSON file, or the one under `key` of it."""
    try:
        found = json.loads(path.read_text())
        found = found[key] if key else found
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, wanted an object")
    return found


def some(names):
    """At most 20 of the names, and how many more."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
