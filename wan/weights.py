"""Checkpoints of the real world: load() finds out their layout, export() writes the video model.

official    Wan2.1 as released: config.json (_class_name WanModel) and
            diffusion_pytorch_model*.safetensors, maybe sharded
diffusers   the same with other names (_class_name WanTransformer3DModel), in a folder
            transformer/ or in the folder itself
own         what save_pretrained writes: config.json (our Config) and model.safetensors
published   the authors' Uni-ViGU: one .pth file without a config, its weights under "model"
"""

import hashlib
import math
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import (
    parse_safetensors_file_metadata,
    save_torch_state_dict,
    snapshot_download,
)
from safetensors import safe_open
from torch import nn

from engine.files import atomic, check_fetched, one_line, read_json, shorten, write_json
from univigu import PRESETS, UniViGU

from .names import (
    CLASSES,
    CONFIG_FIXED,
    CONFIG_KEYS,
    DIFFUSERS,
    NAMES,
    PUBLISHED,
    SUPPORTED,
    our_name,
    rename,
    sizes_of,
    split,
    their_name,
)
from .published import PublishedConfig, build, config_from

OPTIONS = {f.name for f in fields(PublishedConfig)}  # of every Config
WEIGHTS = "diffusion_pytorch_model"
# What Wan2.2 has instead of one transformer, or beside it: others draw at other clocks.
SECOND = ("transformer_2", "high_noise_model", "low_noise_model")
JSON = [
    "config.json",
    "train.json",
    "world.json",
    "model_index.json",
    "transformer/config.json",
    *(f"{name}/config.json" for name in SECOND),
    f"{WEIGHTS}*.json",
    f"transformer/{WEIGHTS}*.json",
]
SHARD = "5GB"
# Names of the parameters that Wan computes with in fp32 hold one of these.
FP32 = re.compile("norm|modulation|time_embedding|time_projection")
# What other programs put before a parameter's name, FSDP and torch.compile also within it.
WRAPPERS = r"_fsdp_wrapped_module\.|_orig_mod\."
PREFIXES = re.compile(rf"^(?:model\.|module\.|diffusion_model\.|{WRAPPERS})+|{WRAPPERS}")
LORA = re.compile("lora|lokr|hada_|dora_scale")


class Tensor(NamedTuple):
    """A tensor of a checkpoint, not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] | None  # None where only the hub has it


@dataclass
class Found:
    """A checkpoint of which only headers were read."""

    layout: str
    where: Path  # its folder, or its .pth file
    tensors: dict[str, Tensor]  # by our names
    unexpected: list[str]  # its names that the layout does not have


def load(
    path_or_hub_id,
    *,
    base=None,
    dtype=torch.float32,
    device="cpu",
    make_model=build,
    **overrides,
):
    """A checkpoint in any of the four layouts -> its model on `device`: UniViGU, or
    PublishedUniViGU. Memory peaks at about one copy.

    path_or_hub_id: a folder, a .pth file, or a repository of the hub. A Wan2.1 checkpoint gets a
    new text stream, whose parameters are listed on stdout; its sizes are those of
    PRESETS["wan-1.3b"] (text_ffn_dim: dim). base: the Wan2.1 checkpoint, path or hub id, that
    supplies what a published .pth lacks of the video model. dtype: of the parameters; norms,
    modulation tables and the networks of the clocks stay in fp32, as Wan computes with them.
    make_model: config -> the model that gets the weights. overrides: fields of Config that the
    checkpoint does not decide.

    Raises FileNotFoundError where there is no checkpoint; ValueError for one that is damaged, holds
    more than tensors, is no text-to-video Wan, or does not fit: then missing, unexpected and
    mis-shaped tensors are listed by name. (The system keeps a .pth file's pages in memory as long
    as nothing else needs it.)
    """
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"dtype is {dtype!r}, wanted a floating-point torch.dtype")
    model, read, new = open_model(path_or_hub_id, base=base, make_model=make_model, **overrides)
    for name, p in list(model.named_parameters()):
        p = nn.Parameter(read(name, device, kept_in(name, dtype)), p.requires_grad)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, p)
    if new:
        model.start_text()
    return model


class Opened(NamedTuple):
    """A checkpoint whose weights are read one after the other."""

    model: nn.Module  # on the meta device
    read: Callable  # (name of a parameter, device, dtype) -> its value; ValueError where not finite
    new: list[str]  # names of the parameters that the checkpoint lacks, which `read` draws


def open_model(path_or_hub_id, *, base=None, make_model=build, **overrides):
    """What load() loads, as Opened; a model with new parameters still wants its start_text().

    Raises as load().
    """
    found, config = inspect_checkpoint(path_or_hub_id, base, overrides)
    with torch.device("meta"):
        model, blank = make_model(config), make_model(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new = [name for name in shapes if found.layout in CLASSES and model.is_text(name)]
    check_tensors(found, shapes, new)
    print_new({name: shapes[name] for name in new})

    @cache
    def drawn():
        for name in new:
            module, _, leaf = name.rpartition(".")
            p = nn.Parameter(torch.empty(shapes[name]))
            setattr(blank.get_submodule(module), leaf, p)
        blank.init_weights()  # what is on the meta device takes no time and no random numbers
        return dict(blank.named_parameters())

    def read(name, device="cpu", dtype=torch.float32):
        if name not in found.tensors:
            return drawn()[name].detach().to(device, dtype)
        # a copy, for the file may change while the model lives
        values = found.tensors[name].read().to(device, dtype, copy=True)
        if not all(extreme.isfinite() for extreme in values.aminmax()):
            theirs = their_name(name, found.layout)
            raise ValueError(f"{found.where}: {theirs} holds NaN or infinity in {dtype}")
        return values

    return Opened(model, read, new)


def kept_in(name, dtype):
    """The dtype of a parameter in a model of `dtype`."""
    return torch.float32 if FP32.search(name) else dtype


def export(model, path, layout):
    """Writes the video model, without its text stream, for Wan's own code or for diffusers.

    layout: "official" writes path/config.json and path/diffusion_pytorch_model*.safetensors,
    "diffusers" the same to path/transformer, in files of at most 5 GB. All tensors get the widest
    of the parameters' dtypes, since diffusers does not run a mixture: a model loaded in bf16, parts
    of which are fp32, is written in fp32, without loss; after model.bfloat16() it is written in
    bf16. Wan's own code has patch_size (1, 2, 2) and prompt_dim 4096 built in, and neither layout
    can say that latents are raw.

    Replaces an earlier export. Raises ValueError for another layout, and where the folder holds
    anything else; OSError where it cannot be written.
    """
    if layout not in CLASSES:
        raise ValueError(f"layout is {layout!r}, wanted one of {', '.join(CLASSES)}")
    folder = Path(path).absolute() / ("transformer" if layout == "diffusers" else "")
    if folder.exists() and not is_export(folder):
        raise ValueError(
            f"{folder} exists and is no export, wanted a new or empty folder, or an earlier export"
        )
    dtype = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    tensors = {
        rename(name, NAMES[layout]): p.detach().to(dtype)
        for name, p in model.named_parameters()
        if not model.is_text(name)
    }
    with atomic(folder) as part:
        part.mkdir()
        pattern = WEIGHTS + "{suffix}.safetensors"
        save_torch_state_dict(tensors, part, filename_pattern=pattern, max_shard_size=SHARD)
        write_json(part / "config.json", exported_config(model.config, layout))


def exported_config(config, layout):
    """A Config as the config.json of Wan's own code or of diffusers."""
    stored = {"_class_name": CLASSES[layout], **CONFIG_FIXED[layout]}
    stored |= {key: getattr(config, name) for name, key in CONFIG_KEYS[layout].items()}
    if layout == "diffusers":
        stored["attention_head_dim"] = config.dim // config.num_heads
    return dict(sorted(stored.items()))


def config(path_or_hub_id, *, base=None, **overrides):
    """The config of the model that load() would return, from headers alone.

    Of a repository of the hub no weights are downloaded but a .pth, see find(). Raises as load(),
    which also compares names, shapes and values.
    """
    _, found = inspect_checkpoint(path_or_hub_id, base, overrides, weights=False)
    return found


def is_wan(checkpoint):
    """Whether a checkpoint is one of the real world, in a layout of its own or on the hub.

    Otherwise it is a folder that train.py wrote, or nothing. True, too, for a file and for weights
    that find() refuses.
    """
    path = Path(checkpoint)
    if path.is_dir():
        foreign = any(any(path.glob(name)) for name in ("*.pth", f"{WEIGHTS}*"))
        foreign |= any((path / name).is_dir() for name in ("transformer", *SECOND))
        others = any(path.glob("*.safetensors")) and not (path / "model.safetensors").is_file()
        return foreign or others
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)) is not None
    return path.is_file() or path.suffix == ".pth" or is_hub_id


def layout(path_or_hub_id):
    """A checkpoint's layout: "official", "diffusers", "own" or "published".

    Raises FileNotFoundError or ValueError where there is none.
    """
    name, _ = find(path_or_hub_id, weights=False)
    return name


# ---------------------------------------------------------------- finding


def find(path_or_hub_id, weights=True):
    """A path or hub id -> its layout, and the folder or .pth file that holds its weights.

    Of a repository of the hub only what load() needs is downloaded. weights=False: only the JSON
    files, but all of a .pth, which has no header, after a line on stderr.
    """
    remote = not Path(path_or_hub_id).exists()
    path = download(path_or_hub_id, *JSON) if remote else Path(path_or_hub_id)
    if path.is_file():
        if path.suffix != ".pth":
            raise ValueError(f"checkpoint {path} {what_file(path)}")
        return "published", path
    check_one_model(path)
    inner = path / "transformer"
    folder = inner if (inner / "config.json").is_file() else path
    kind = layout_of(folder / "config.json")
    if kind == "published":
        if remote:
            download_pth(path_or_hub_id, path, announce=not weights)
        return kind, the_pth(folder, path_or_hub_id)
    if remote and weights:
        wan = folder.relative_to(path) / f"{WEIGHTS}*.safetensors"
        download(path_or_hub_id, "model.safetensors" if kind == "own" else str(wan))
    return kind, folder


def check_one_model(folder):
    """Raises ValueError for Wan2.2, in the diffusers or the official layout, or a part of it."""
    root = folder.parent if folder.name in ("transformer", *SECOND) else folder
    index = root / "model_index.json"
    said = read_json(index) if index.is_file() else {}
    second = [name for name in SECOND if (root / name).is_dir()]
    second += [name for name in said if name.startswith("transformer_") and any(said[name] or ())]
    if second:
        raise ValueError(
            f"{root} is a Wan2.2 of two models, it has {', '.join(dict.fromkeys(second))}: each "
            "draws at its own noise levels. Wanted a Wan2.1, which has one transformer"
        )
    if said.get("expand_timesteps"):
        raise ValueError(f"{index} has expand_timesteps, as the 5B of Wan2.2, wanted a Wan2.1")


def what_file(path):
    """What a file is that is given as a checkpoint, and what is wanted."""
    wanted = "wanted a folder or a .pth file"
    if path.suffix != ".safetensors":
        return f"is a file, {wanted}"
    names = [PREFIXES.sub("", name) for name in local_header(path)]
    if any(map(LORA.search, names)):
        return "holds a LoRA, wanted a whole model: merge it into its Wan2.1 first"
    if (path.parent / "config.json").is_file():
        return f"is one file of a checkpoint, wanted its folder, {path.parent}"
    for kind in CLASSES:
        if sum(our_name(name, kind) is not None for name in names) > len(names) / 2:
            return (
                f"holds Wan's weights ({kind} layout) alone, wanted a folder with them as "
                f"{WEIGHTS}.safetensors, and the config.json of their Wan2.1"
            )
    return f"holds {len(names)} tensors that are no Wan's ({shorten(names[:3])}, ...), {wanted}"


def layout_of(path):
    """The layout that a config.json is of; "published" where there is none, or a foreign one."""
    stored = read_json(path) if path.is_file() else {}
    name = stored.get("_class_name")
    for kind, known in CLASSES.items():
        if name == known:
            return kind
    if name is not None:
        wanted = ", ".join(CLASSES.values())
        raise ValueError(f"{path} has _class_name {name!r}, wanted one of {wanted}")
    return "own" if "text_flow" in stored else "published"


def the_pth(folder, path_or_hub_id):
    """The one .pth file in a folder. Raises FileNotFoundError where there is not one, ValueError
    where other weights are in its place."""
    files = sorted(folder.rglob("*.pth"))
    if not files and (alone := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"checkpoint {alone[0]} {what_file(alone[0])}")
    if len(files) != 1:
        there = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{path_or_hub_id} holds no checkpoint, found {shorten(there) or 'nothing'}, "
            "wanted config.json with its .safetensors, or one .pth file"
        )
    return files[0]


def download(hub_id, *patterns):
    """The folder with those files of a repository of the hub that match."""
    return Path(ask_hub(snapshot_download, str(hub_id), allow_patterns=[*patterns]))


def download_pth(hub_id, folder, announce):
    """Downloads a repository's .pth. announce: first says so on stderr, if it is not there yet."""
    if announce and not any(folder.rglob("*.pth")):
        print(
            f"{hub_id} has no config.json that tells its sizes, and a .pth has no header to read "
            "alone: its .pth is downloaded",
            file=sys.stderr,
        )
    download(hub_id, "*.pth")


def ask_hub(function, hub_id, *args, **options):
    """Calls a function of huggingface_hub. Raises FileNotFoundError, in one line, if it fails."""
    try:
        return function(hub_id, *args, **options)
    except Exception as error:  # no network, no such name, no permission: each has its own errors
        raise FileNotFoundError(
            f"{hub_id} is neither here nor on the hub: {type(error).__name__}: {one_line(error)}"
        ) from None


# ---------------------------------------------------------------- headers


def inspect_checkpoint(path_or_hub_id, base, overrides, weights=True):
    """A checkpoint -> Found, with what it lacks from its base, and its config. weights: see find().

    Raises as load().
    """
    if unknown := sorted(set(overrides) - OPTIONS):
        raise ValueError(f"overrides have {', '.join(unknown)}, wanted fields of Config")
    found = open_checkpoint(path_or_hub_id, weights)
    if found.layout == "own":
        found = with_base(found, weights)
    if base is not None and (found.layout != "published" or lacks_video(found.tensors)):
        found = complete(found, open_checkpoint(base, weights), base)
    try:
        return found, make_config(found, overrides)
    except TypeError as error:
        raise ValueError(
            f"{found.where}: a value of its config.json, or an override, has a wrong type: {error}"
        ) from None


def lacks_video(tensors):
    """Whether part of the video model is missing altogether."""
    stems = {stem for _, stem, _ in map(split, tensors)}
    return not stems.issuperset(DIFFUSERS)


def complete(found, base, name):
    """A published checkpoint with what it lacks from its base, a Wan2.1 checkpoint."""
    if found.layout != "published" or base.layout not in CLASSES:
        raise ValueError(
            f"base {name} is of layout {base.layout}, for a checkpoint of layout {found.layout}, "
            "wanted a Wan2.1 checkpoint for a published one"
        )
    unexpected = found.unexpected + base.unexpected
    return Found(found.layout, found.where, base.tensors | found.tensors, unexpected)


def base_of(folder):
    """What train.json says of a checkpoint's base, {"checkpoint", "digest"}: the one that has the
    weights which its run did not train. None where it has all of them."""
    file = folder / "train.json"
    return read_json(file).get("base") if file.is_file() else None


def as_base(path_or_hub_id):
    """What a run that starts from this checkpoint, and trains the text alone, says of its base."""
    kind, where = find(path_or_hub_id, weights=False)
    if kind == "own" and base_of(where):
        return base_of(where)
    found = open_checkpoint(path_or_hub_id, weights=True)
    here = Path(path_or_hub_id)
    name = str(here.resolve()) if here.exists() else str(path_or_hub_id)
    return {"checkpoint": name, "digest": digest(video_of(found))}


def video_of(found):
    """The tensors of a checkpoint's video model."""
    return {name: t for name, t in found.tensors.items() if not UniViGU.is_text(name)}


def with_base(found, weights):
    """A checkpoint of our own with what it has from its base. weights: see find(). Raises as
    check_base()."""
    stored = base_of(found.where)
    if stored is None:
        return found
    check_base(stored, found.where, weights)
    video = video_of(open_checkpoint(stored["checkpoint"], weights))
    return Found("own", found.where, video | found.tensors, found.unexpected)


def open_base(stored, folder, *, make_model, **overrides):
    """The base of the checkpoint in `folder` as Opened. stored: see base_of. Raises as load()."""
    check_base(stored, folder, weights=True)
    return open_model(stored["checkpoint"], make_model=make_model, **overrides)


def check_base(stored, folder, weights):
    """Raises FileNotFoundError where the base of the checkpoint in `folder` is not there,
    ValueError where its weights are others."""
    name, wanted = (
        stored.get(key) if isinstance(stored, dict) else None for key in ("checkpoint", "digest")
    )
    if not isinstance(name, str) or not isinstance(wanted, str):
        raise ValueError(
            f"base in {folder / 'train.json'} is {stored!r:.80}, wanted the path or hub id of a "
            "checkpoint and its digest"
        )
    if Path(name).is_absolute() and not Path(name).exists():
        raise FileNotFoundError(
            f"{folder} lacks its base: {name} is gone, wanted it back, or its new place in "
            f"{folder / 'train.json'}"
        )
    try:
        base = open_checkpoint(name, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} lacks its base: {one_line(error)}") from None
    if weights and not video_of(base):
        raise ValueError(f"{folder} has the base {name}, which holds a text stream alone")
    if weights and (found := digest(video_of(base))) != wanted:
        raise ValueError(
            f"{folder} was trained on the weights {wanted} of {name}, which has {found} now, "
            "wanted the same"
        )


def open_checkpoint(path_or_hub_id, weights):
    """A checkpoint as it is found. weights: see find()."""
    kind, where = find(path_or_hub_id, weights)
    hub_id = None if weights or Path(path_or_hub_id).exists() else str(path_or_hub_id)
    if kind == "published":
        tensors = open_pth(where)
    else:
        tensors = open_safetensors(where, "model" if kind == "own" else WEIGHTS, hub_id)
    names = Counter(PREFIXES.sub("", name) for name in tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{where} has {shorten(twice)} more than once, with different prefixes")
    tensors = {PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}
    ours = {theirs: our_name(theirs, kind) for theirs in tensors}
    if kind == "published" and not any(ours.values()):
        has = shorten(list(tensors)) or "no tensors"
        raise ValueError(f"{where} has {has}, wanted the names of a published Uni-ViGU")
    known = {ours[theirs]: tensor for theirs, tensor in tensors.items() if ours[theirs]}
    return Found(kind, where, known, [theirs for theirs in tensors if not ours[theirs]])


def open_safetensors(folder, stem, hub_id=None):
    """{name: Tensor} of one file, or of all shards that an index JSON names.

    hub_id: the repository whose files these are; it is asked for the headers of those that are not
    here. Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    index = folder / f"{stem}.safetensors.index.json"
    named = [f"{stem}.safetensors"]
    if index.is_file():
        named = list(read_json(index, "weight_map").values())
    for name in named:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}, wanted one of its own folder")
    names = sorted(set(named))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent and not hub_id:
        raise FileNotFoundError(f"{folder} lacks {shorten(absent)}")
    found = {}
    remote_folder = "transformer/" if folder.name == "transformer" else ""
    for name in absent:
        found |= remote_header(hub_id, remote_folder + name)
    for name in names:
        if name not in absent:
            found |= local_header(folder / name)
    return found


def remote_header(hub_id, name):
    """{name: Tensor} of a .safetensors file on the hub, its tensors unreadable."""
    header = ask_hub(parse_safetensors_file_metadata, hub_id, name)
    return {key: Tensor(tuple(tensor.shape), None) for key, tensor in header.tensors.items()}


def local_header(path):
    """{name: Tensor} of a .safetensors file. Raises ValueError for integers in it."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except Exception as error:  # the library's own errors for damaged files
        check_fetched(path)
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if odd := [f"{name} {kind}" for name, kind in dtypes.items() if not re.match("B?F[0-9]", kind)]:
        raise ValueError(f"{path} has {shorten(odd)}, wanted floating-point numbers")
    return {name: Tensor(shape, partial(read_tensor, path, name)) for name, shape in shapes.items()}


def read_tensor(path, name):
    """One tensor, mapped from the file.

    The file is opened for it alone: a mapping that stayed would count all that was read so far.
    """
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def open_pth(path):
    """{name: Tensor} of a published file.

    No pickled code runs. Raises ValueError for a file that is damaged or holds more than tensors.
    """
    try:
        stored = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["model"]
        return {
            name: Tensor(tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
            for name, tensor in stored.items()
        }
    except pickle.UnpicklingError:
        check_fetched(path)
        raise ValueError(
            f"{path} holds more than tensors, and is not read: what it pickles could run code"
        ) from None
    except Exception as error:  # truncated and foreign files fail in many ways
        check_fetched(path)
        raise ValueError(
            f"{path} is not read, found {type(error).__name__}: {one_line(error)[:200]}, "
            "wanted torch.save of a dict with tensors by name under 'model'"
        ) from None


# ---------------------------------------------------------------- the config


def make_config(found, overrides):
    """The config of a checkpoint: what it says, the overrides, else PRESETS["wan-1.3b"]."""
    sizes = sizes_of({name: tensor.shape for name, tensor in found.tensors.items()})
    preset = asdict(PRESETS["wan-1.3b"])
    if found.layout == "own":
        known, rest = own_config(found.where / "config.json"), {}
    elif found.layout == "published":
        known = sizes | published_config(found, sizes.get("dim", preset["dim"]))
        rest = preset | {"num_heads": max(1, known.get("dim", 0) // 128)}
    else:
        known = sizes | wan_config(found.where / "config.json", found.layout)
        rest = preset | {"text_ffn_dim": known["dim"]}
    check_overrides(found.where, overrides, known)
    try:
        return config_from(rest | known | overrides)
    except ValueError as error:
        raise ValueError(f"{found.where}: {error}") from None


def check_overrides(where, overrides, known):
    """Raises ValueError for an override that contradicts what the checkpoint says of itself."""
    for name, value in overrides.items():
        free = name == "discrete_loss" or name.startswith("text_")
        if free or name not in known:
            continue
        wanted = known[name]
        if name == "patch_size":
            value, wanted = tuple(value), tuple(wanted)
        if value != wanted:
            raise ValueError(
                f"{name} is {value!r} among the overrides, wanted {wanted!r} of {where}"
            )


def own_config(path):
    """The values in a config.json of ours. Raises ValueError for names that are not Config's."""
    stored = read_json(path)
    if unknown := sorted(set(stored) - OPTIONS):
        raise ValueError(f"{path} has {', '.join(unknown)}, wanted fields of Config")
    return stored


def wan_config(path, layout):
    """The fields of Config in a config.json of Wan's. Raises ValueError for an unsupported Wan."""
    stored = read_json(path)
    for key, allowed in SUPPORTED.items():
        if stored.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} has {key} {stored[key]!r}, wanted {allowed[0]!r}: "
                "of Wan, only text-to-video is supported"
            )
    keys = dict(CONFIG_KEYS[layout])
    if layout == "diffusers":
        keys["dim"] = "attention_head_dim"
    if absent := [key for key in keys.values() if key not in stored]:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    known = {name: stored[key] for name, key in keys.items()}
    if layout == "diffusers":
        known["dim"] *= known["num_heads"]
    return known


def published_config(found, dim):
    """The fields of Config that the published layout implies.

    Takes the text's rotary frequencies, which are no parameter, out of found.tensors. Raises
    ValueError where they are others than ours.
    """
    known = {"text_flow": "discrete", "text_dim": dim, "text_ffn_init": "copy", "latents": "raw"}
    if "inv_freq" in found.tensors:
        frequencies = found.tensors.pop("inv_freq").read().double()
        n = frequencies.numel()
        wanted = 10000 ** -(torch.arange(n, dtype=torch.float64) / n)
        same_shape = frequencies.shape == wanted.shape and n > 0
        # they may have been cast to bf16
        if not same_shape or not torch.allclose(frequencies, wanted, rtol=0.01):
            name = PUBLISHED["inv_freq"]
            raise ValueError(f"{found.where}: {name} is not 10000^(-2i / head width)")
        known["num_heads"] = dim // (2 * n)
    return known


# ---------------------------------------------------------------- the model


def check_tensors(found, shapes, new):
    """Raises ValueError unless the tensors found are the model's, but for those in `new`.

    shapes: {our name: shape} of the model.
    """
    theirs = partial(their_name, layout=found.layout)
    there = {name: tensor.shape for name, tensor in found.tensors.items()}
    missing = [theirs(name) for name in shapes if name not in there and name not in new]
    unexpected = found.unexpected + [theirs(name) for name in there if name not in shapes]
    misshapen = [
        f"{theirs(name)} {shape}, wanted {shapes[name]}"
        for name, shape in there.items()
        if shapes.get(name, shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshapen}
    if not any(faults.values()):
        return
    counts = (f"{len(n)} {fault}: {shorten(n)}" for fault, n in faults.items() if n)
    hint = ""
    if found.layout == "published" and missing:
        hint = "; with base= the video model's come from a Wan2.1 checkpoint"
    raise ValueError(f"{found.where} does not fit the model: {'; '.join(counts)}{hint}")


def digest(tensors, more=b""):
    """A fingerprint of tensors, 16 hexadecimal digits: of each one's name and its first and last
    64 KiB, and of `more`. umT5 has 22 GB: to read all of it at every start would take a minute, and
    other weights differ everywhere."""
    total = hashlib.sha256(more)
    for name in sorted(tensors):
        # mapped from the file: only what is looked at is read
        data = tensors[name].read().flatten().view(torch.uint8)
        total.update(name.encode())
        total.update(data[:65536].numpy().tobytes())
        total.update(data[-65536:].numpy().tobytes())
    return total.hexdigest()[:16]


def print_new(shapes):
    """Lists new parameters and their sizes, those of all blocks together."""
    counts = Counter()
    for name, shape in shapes.items():
        module = re.match(r"(blocks\.\d+\.)?\w+", name)[0]
        counts[re.sub(r"\d+", "*", module)] += math.prod(shape)
    for name, count in counts.items():
        print(f"new: {name}, {count:,} parameters")


def is_export(folder):
    """Whether a folder is empty, or holds what export() writes and nothing else."""
    if not folder.is_dir():
        return False
    names = [f.name for f in folder.iterdir()]
    if not names:
        return True
    ours = all(name == "config.json" or name.startswith(WEIGHTS) for name in names)
    if not ours or "config.json" not in names:
        return False
    return read_json(folder / "config.json").get("_class_name") in CLASSES.values()
