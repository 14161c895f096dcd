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
import sys
from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import parse_safetensors_file_metadata, save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import nn

from univigu import PRESETS, UniViGU

from .published import PublishedConfig, build, config_from

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
FP32 = re.compile("norm|modulation|time_embedding|time_projection")  # parameters that Wan computes with in fp32: names that hold one of these
WEIGHTS = "diffusion_pytorch_model"
JSON = ["config.json", "train.json", "world.json", "transformer/config.json", f"{WEIGHTS}*.json", f"transformer/{WEIGHTS}*.json"]
SHARD = "5GB"


def load(path_or_hub_id, *, base=None, dtype=torch.float32, device="cpu", **overrides):
    """A checkpoint in any of the four layouts -> UniViGU on `device`. Memory peaks at about one copy.

    dtype: of the parameters, but for norms, modulation tables and the networks of the clocks: these stay in fp32, as Wan computes with them.
    path_or_hub_id: a folder, a .pth file, or a repository of the hub. A Wan2.1 checkpoint gets a new text stream, whose parameters
    are listed on stdout; its sizes are those of PRESETS["wan-1.3b"] (text_ffn_dim: dim). base: the Wan2.1 checkpoint, path or hub id,
    that supplies what a published .pth lacks of the video model. overrides: Config fields that the checkpoint does not decide.
    Raises FileNotFoundError where there is no checkpoint, ValueError for one that is damaged, holds more than tensors, is no
    text-to-video Wan, or does not fit: then missing, unexpected and mis-shaped tensors are listed by name. (Of a .pth, the system
    also keeps the file's pages in memory, as long as nothing else needs it.)
    """
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"dtype is {dtype!r}, wanted a floating-point torch.dtype")
    kind, where, tensors, unexpected, cfg = look(path_or_hub_id, base, overrides)
    with torch.device("meta"):
        model = build(cfg)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new = [name for name in wanted if kind in CLASSES and UniViGU.is_text(name)]
    check(kind, where, {name: shape for name, (shape, _) in tensors.items()}, wanted, new, unexpected)

    dtypes = {name: torch.float32 if FP32.search(name) else dtype for name in wanted}
    for name in new:
        place(model, name, torch.empty(wanted[name], dtype=dtypes[name], device=device))
    model.init_weights()                                            # does nothing on the meta device: what will be loaded stays unmade
    for name, (_, read) in tensors.items():
        tensor = read().to(device, dtypes[name], copy=True)         # a copy: the file may change or go while the model lives
        if not all(x.isfinite() for x in tensor.aminmax()):
            raise ValueError(f"{where}: {theirs(name, kind)} holds NaN or infinity in {tensor.dtype}")
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

    layout: "official" writes path/config.json and path/diffusion_pytorch_model*.safetensors, "diffusers" the same to path/transformer, in files of at
    most 5 GB. All tensors get the widest of the parameters' dtypes, for diffusers does not run a mixture: what load() made in bf16, and kept in fp32 in
    parts, is written in fp32, without loss; after model.bfloat16() it is written in bf16. Wan's own code has patch_size (1, 2, 2) and prompt_dim 4096
    built in; neither layout can say latents="raw". An earlier export is replaced; raises ValueError for another layout, and where the folder holds
    anything else.
    """
    if layout not in CLASSES:
        raise ValueError(f"layout is {layout!r}, wanted one of {', '.join(CLASSES)}")
    folder = Path(path).absolute() / ("transformer" if layout == "diffusers" else "")
    if folder.exists() and not is_export(folder):
        raise ValueError(f"{folder} exists and is no export: wanted a new or empty folder, or one that export() wrote")
    c = model.config
    stored = {"_class_name": CLASSES[layout], **CONFIG_FIXED[layout], **{key: getattr(c, name) for name, key in CONFIG_KEYS[layout].items()}}
    if layout == "diffusers":
        stored["attention_head_dim"] = c.dim // c.num_heads
    dtype = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    tensors = {rename(name, NAMES[layout]): p.detach().to(dtype) for name, p in model.named_parameters() if not model.is_text(name)}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_torch_state_dict(tensors, part, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=SHARD)
        (part / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def config(path_or_hub_id, *, base=None, **overrides):
    """The Config of the model that load() would return, from headers alone: of the hub, no weights are downloaded but a .pth, see find().
    Raises as load(), which also compares names, shapes and values."""
    return look(path_or_hub_id, base, overrides, weights=False)[-1]


def is_wan(checkpoint):
    """Whether a checkpoint is one of the real world, in a layout of its own or on the hub; else it is a folder of train.py's, or nothing."""
    path = Path(checkpoint)
    if path.is_dir():
        return (path / "transformer").is_dir() or any(path.glob("*.pth")) or any(path.glob(f"{WEIGHTS}*"))
    return path.suffix == ".pth" or not path.exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)))


def layout(path_or_hub_id):
    """The name of a checkpoint's layout: "official", "diffusers", "own" or "published". Raises FileNotFoundError, ValueError where there is none."""
    return find(path_or_hub_id, weights=False)[0]


# ---------------------------------------------------------------- looking

def look(path_or_hub_id, base, overrides, weights=True):
    """A checkpoint, unread: its layout, where it is, {our name: (shape, function that reads the tensor)}, names that the layout does not have, Config."""
    if unknown := sorted(set(overrides) - {f.name for f in fields(PublishedConfig)}):
        raise ValueError(f"unknown overrides {', '.join(unknown)}: wanted fields of Config")
    kind, where, tensors, unexpected = open_checkpoint(path_or_hub_id, weights)
    stems = {re.sub(r"^blocks\.\d+", "blocks.*", name.removesuffix(".weight").removesuffix(".bias")) for name in tensors}
    if base is not None and (kind != "published" or not DIFFUSERS.keys() <= stems):         # else nothing is missing: do not fetch it
        base_kind, _, base_tensors, base_unexpected = open_checkpoint(base, weights)
        if kind != "published" or base_kind not in CLASSES:
            raise ValueError(f"base {base} is of layout {base_kind}, for a checkpoint of layout {kind}; wanted a Wan2.1 checkpoint for a published one")
        tensors, unexpected = base_tensors | tensors, unexpected + base_unexpected
    try:
        return kind, where, tensors, unexpected, make_config(kind, where, tensors, overrides)
    except TypeError as error:
        raise ValueError(f"{where}: a value of its config.json, or an override, has a wrong type: {error}") from None


def find(path_or_hub_id, weights=True):
    """A path or hub id -> (layout, the folder, or .pth file, that holds the weights). Of the hub, what load() needs is downloaded and nothing else.

    weights=False: of the hub, only the JSON files; but where there is only a .pth, all of it, after a line on stderr: it has no header.
    """
    path, remote = Path(path_or_hub_id), not Path(path_or_hub_id).exists()
    fetch = lambda *patterns: Path(ask_hub(snapshot_download, str(path_or_hub_id), allow_patterns=[*patterns]))
    path = fetch(*JSON) if remote else path
    if path.is_file():
        if path.suffix != ".pth":
            raise ValueError(f"checkpoint {path} ends in {path.suffix!r}, wanted a folder or a .pth file")
        return "published", path
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    stored = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = stored.get("_class_name")
    if name is not None and name not in CLASSES.values():
        raise ValueError(f"{folder / 'config.json'} has _class_name {name!r}, wanted one of {', '.join(CLASSES.values())}")
    kind = next((kind for kind in CLASSES if CLASSES[kind] == name), "own" if "text_flow" in stored else "published")
    if kind != "published":
        if remote and weights:
            fetch("model.safetensors" if kind == "own" else f"{folder.relative_to(path) / WEIGHTS}*.safetensors")
        return kind, folder
    if remote:
        if not weights and not any(path.rglob("*.pth")):
            print(f"{path_or_hub_id} has no config.json that tells its sizes, and a .pth has no header to read alone: its .pth is downloaded", file=sys.stderr)
        fetch("*.pth")
    pickles = sorted(folder.rglob("*.pth"))
    if len(pickles) != 1:
        raise FileNotFoundError(f"{path_or_hub_id} holds no checkpoint: wanted config.json with its .safetensors, or one .pth file; "
                                f"found {path.is_dir() and some(sorted(f.name for f in path.iterdir())) or 'none of them'}")
    return "published", pickles[0]


def ask_hub(function, hub_id, *args, **options):
    """What a function of huggingface_hub returns. Raises FileNotFoundError, in one line, where it fails."""
    try:
        return function(hub_id, *args, **options)
    except Exception as error:  # no network, no such name, no permission: each has errors of its own
        raise FileNotFoundError(f"{hub_id} is neither here nor on the hub: {type(error).__name__}: {one_line(error)}") from None


def open_checkpoint(path_or_hub_id, weights):
    """(layout, where it is, {our name: (shape, function that reads the tensor)}, [names that the layout does not have]). weights: see find()."""
    kind, where = find(path_or_hub_id, weights)
    hub_id = None if weights or Path(path_or_hub_id).exists() else str(path_or_hub_id)
    found = open_pth(where) if kind == "published" else open_safetensors(where, "model" if kind == "own" else WEIGHTS, hub_id)
    table = {theirs: ours for ours, theirs in NAMES[kind].items()} if kind in NAMES else None
    ours = {name: rename(name, table) for name in found}
    if kind == "published" and not any(ours.values()):
        raise ValueError(f"{where} has {some(list(found)) or 'no tensors'}: wanted the names of a published Uni-ViGU")
    return kind, where, {ours[name]: tensor for name, tensor in found.items() if ours[name]}, [name for name in found if not ours[name]]


def open_safetensors(folder, stem, hub_id=None):
    """{name: (shape, read)} of one file, or of all shards that an index JSON names.

    hub_id: the repository whose files these are; of those that are not here it is asked for the headers, and `read` is None.
    """
    index = folder / f"{stem}.safetensors.index.json"
    named = list(read_json(index, "weight_map").values()) if index.is_file() else [f"{stem}.safetensors"]
    if strange := [file for file in named if not isinstance(file, str) or Path(file).name != file]:
        raise ValueError(f"{index} names the file {strange[0]!r}, wanted one of its own folder")
    files = sorted(set(named))
    absent, found = [file for file in files if not (folder / file).is_file()], {}
    if absent and not hub_id:
        raise FileNotFoundError(f"{folder} lacks {some(absent)}")
    for file in absent:
        header = ask_hub(parse_safetensors_file_metadata, hub_id, f"transformer/{file}" if folder.name == "transformer" else file)
        found |= {name: (tuple(tensor.shape), None) for name, tensor in header.tensors.items()}
    for path in (folder / file for file in files if file not in absent):
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found |= {name: (tuple(tensor.get_shape()), partial(read_tensor, path, name)) for name, tensor in slices.items()}
                whole = [f"{name} {tensor.get_dtype()}" for name, tensor in slices.items() if not re.match("B?F[0-9]", tensor.get_dtype())]
        except Exception as error:  # the library's own errors for damaged files
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
        if whole:
            raise ValueError(f"{path} has {some(whole)}: wanted floating-point numbers")
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
                         f"{type(error).__name__}: {one_line(error)[:200]}") from None


# ---------------------------------------------------------------- names and sizes

def check(kind, where, found, wanted, new, unexpected):
    """Raises ValueError unless the tensors found are those wanted, both {our name: shape}, but for the names in `new`."""
    faults = {"missing": [theirs(name, kind) for name in wanted if name not in found and name not in new],
              "unexpected": unexpected + [theirs(name, kind) for name in found if name not in wanted],
              "mis-shaped": [f"{theirs(name, kind)} {shape}, wanted {wanted[name]}" for name, shape in found.items() if wanted.get(name, shape) != shape]}
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {some(names)}" for fault, names in faults.items() if names)
        hint = "; with base= the video model's come from a Wan2.1 checkpoint" if kind == "published" and faults["missing"] else ""
        raise ValueError(f"{where} does not fit the model: {listed}{hint}")


def theirs(name, kind):
    """Our name of a parameter as the layout has it; ours where it has none."""
    return rename(name, NAMES.get(kind)) or name


def rename(name, table):
    """A parameter's name by a table of stems, block numbers kept; None where the table lacks it. No table: as it is."""
    if table is None:
        return name
    block, stem, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups(default="")
    new = table.get("blocks.*." * bool(block) + stem)
    return new and new.replace("blocks.*.", block) + leaf


def make_config(kind, where, tensors, overrides):
    """The Config of a checkpoint: what the checkpoint says, the overrides, and for the rest what PRESETS["wan-1.3b"] has."""
    if kind == "own":
        known, rest = read_json(where / "config.json"), {}
        if unknown := sorted(set(known) - {f.name for f in fields(PublishedConfig)}):
            raise ValueError(f"{where / 'config.json'} has {', '.join(unknown)}: wanted fields of Config")
    else:
        known, rest = sizes(tensors), asdict(PRESETS["wan-1.3b"])
        if kind == "published":
            known |= published(where, tensors, known.get("dim", rest["dim"]))
            rest["num_heads"] = max(1, known.get("dim", 0) // 128)
        else:
            known |= wan_config(kind, where / "config.json")
            rest["text_ffn_dim"] = known["dim"]
    for name in (name for name in overrides if name in known and not name.startswith("text_")):
        found, wanted = (tuple(value) if name == "patch_size" else value for value in (overrides[name], known[name]))
        if found != wanted:
            raise ValueError(f"{name} is {found!r} among the overrides, but {wanted!r} in {where}")
    try:
        return config_from(rest | known | overrides)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def sizes(tensors):
    """The Config fields that shapes tell. What is absent or misshapen is left out here, to be listed with the others later."""
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    known = {field: shapes[name][axis] for field, (name, axis) in SIZES.items() if len(shapes.get(name, ())) > axis}
    known["num_layers"] = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}) or 1
    if len(shapes.get("patch_embedding.weight", ())) == 5 and shapes.get("head.head.weight"):
        known["patch_size"] = shapes["patch_embedding.weight"][2:]
        known["out_dim"] = shapes["head.head.weight"][0] // math.prod(known["patch_size"])
    return known


def wan_config(kind, path):
    """The Config fields in a config.json of Wan's. Raises ValueError for a Wan that our model is not."""
    stored = read_json(path)
    for key, allowed in SUPPORTED.items():
        if stored.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path} has {key} {stored[key]!r}, wanted {allowed[0]!r}: of Wan, only text-to-video is supported")
    keys = CONFIG_KEYS[kind] | (dict(dim="attention_head_dim") if kind == "diffusers" else {})
    if absent := [key for key in keys.values() if key not in stored]:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    known = {name: stored[key] for name, key in keys.items()}
    if kind == "diffusers":
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
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, wanted an object")
    return found


def some(names):
    """At most 20 of the names, and how many more."""
    return one_line(", ".join(names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def one_line(error):
    """A text, or what an error says (its name where it says nothing), without line breaks."""
    return " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, Exception) else "")
