"""Does training work here? Some clips by heart, and the model asked what it saw.

    python -m wan.smoke --tiny --out runs/smoke            16 tiny clips and a tiny random Wan that
                                                           it makes: two minutes on two CPU cores
    python -m wan.smoke --data data/clips --init Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out runs/smoke
                                                           16 clips of your own, from wan.prepare
    ... --steps 600 --train text                           other flags are train.py's

It trains for a few hundred steps, then prints some captions beside what they should be, and its
checks, each with what it found and what to look at where it fails. Exit code 0: all passed.
"""

import sys
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file

import train
import wan
from engine.files import atomic, check_folder, read_json, read_lines, write_json
from engine.options import Parser, fail, run_command
from engine.score import text_losses
from engine.video import FPS, read_clip, to_frames, write_video
from univigu import understand
from wan.index import write_lines

VAE = "diffusion_pytorch_model.safetensors"
CLIPS = 16
# The toy's recipe, which needs fewer steps than the paper's.
TINY = (
    "--batch 16 --recall-optimizer muon --refine-optimizer muon --recall-lr 0.05 --refine-lr 0.05 "
    "--decay 1 --anchor 0.1 --clocks mixture --text-output x1 --text-shift 4"
)
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
DIRECTIONS = {"right": (0, 3), "left": (0, -3), "up": (-2, 0), "down": (2, 0)}  # pixels a frame


def make_tiny(out):
    """Writes a tiny random Wan and 16 tiny clips into `out`. Returns flags for train.py."""
    from diffusers import WanTransformer3DModel

    from tests.tiny_wan import write_wan_folder
    from wan import prepare

    out.mkdir(parents=True)
    write_wan_folder(out / "wan")
    sizes = dict(num_attention_heads=4, attention_head_dim=24, ffn_dim=192, num_layers=3)
    more = dict(in_channels=16, out_channels=16, text_dim=32, freq_dim=64, rope_max_seq_len=64)
    torch.manual_seed(0)
    WanTransformer3DModel(**sizes, **more).save_pretrained(out / "wan" / "transformer")
    rows = []
    for i, (colour, direction) in enumerate(product(COLOURS, DIRECTIONS)):
        write_video(out / f"{i}.mp4", square(COLOURS[colour], *DIRECTIONS[direction]), FPS)
        prompt, rest = f"a {colour} square moves {direction}", "on a dark background"
        rows.append({"video": f"{i}.mp4", "prompt": prompt, "caption": f"{prompt} {rest}"})
    write_lines(out / "index.jsonl", rows)
    normalise(out / "wan", [out / row["video"] for row in rows])
    where = f"--videos {out} --index {out}/index.jsonl --wan {out}/wan --out {out}/clips"
    limits = "--frames 9 --sizes 32x48 --prompt-tokens 4-40 --caption-tokens 4-40"
    prepare.main(f"{where} {limits}".split())
    return ["--data", f"{out}/clips", "--init", f"{out}/wan"]


def square(colour, down, across):
    """A square that crosses the middle: frames (1, 3, 9, 32, 48)."""
    frames = torch.full((1, 3, 9, 32, 48), -0.9)
    for t in range(9):
        top, left = 8 + down * (t - 4), 16 + across * (t - 4)
        frames[0, :, t, top : top + 16, left : left + 16] = torch.tensor(colour)[:, None, None]
    return frames


def normalise(folder, videos):
    """Has a random VAE give latents of mean 0 and deviation 1 for these videos, as Wan's does for
    its own: else they hardly differ."""
    from wan.codec import Codec

    weights, file = folder / "vae" / VAE, folder / "vae" / "config.json"
    plain = {n: 0 * x if n.endswith("bias") else x for n, x in load_file(weights).items()}
    with atomic(weights) as part:  # random biases would drown what is in a video
        save_file(plain, part, {"format": "pt"})
    codec = Codec(folder)
    frames = torch.cat([to_frames(read_clip(video, [(32, 48)], 9)[0]) for video in videos])
    mu = codec.encode(frames) * codec.std + codec.mean
    apart = (mu - mu.mean(0)).std((0, 2, 3, 4)).tolist()
    stored = read_json(file) | {"latents_mean": mu.mean((0, 2, 3, 4)).tolist()}
    write_json(file, stored | {"latents_std": apart})


def read_back(folder, world):
    """Of at most 16 clips that were learned: [(written, wanted)] of the first, and the share of
    them whose own text fits better than the others' do."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = wan.load(folder, dtype=dtype, device=device).eval()
    data, text = world.dataset("train"), world.texts[-1]
    batch = [data[i] for i in range(min(CLIPS, len(data)))]
    ys = torch.stack([clip[text] for clip in batch]).to(device)
    told, nearest = [], 0
    for i, clip in enumerate(batch):
        z_v = clip["z_v"][None].to(device)
        nearest += text_losses(model, z_v, ys[None]).argmin().item() == i
        if i < 4:
            generator = torch.Generator().manual_seed(i)
            options = world.options("understand", z_v.shape)
            y_hat = understand(model, z_v, generator=generator, **options)
            told.append(world.tokenizer.decode(torch.cat([y_hat, ys[i : i + 1]]).cpu()))
    return told, nearest / len(batch)


def checks(log, validations, share):
    """(what is checked, whether it holds, what was found, what to look at) of each check."""
    few = max(1, len(log) // 10)
    before, after = (fmean(line["text"] for line in part) for part in (log[:few], log[-few:]))
    first, last = (line["video_by_tenth"] for line in (validations[0], validations[-1]))
    was, now = (sum(x for x in column if x) for column in (first, last))
    skipped = log[-1]["skipped"]
    yield (
        "the texts' loss falls to less than half",
        after < 0.5 * before,
        f"{before:.3f} to {after:.3f}",
        "the learning rates, and whether the run has enough steps",
    )
    yield (
        "most clips' own text fits better than the others' do",
        share > 0.5,
        f"{share:.0%} of the clips",
        "whether index.jsonl names the right video beside each text; more steps",
    )
    yield (
        "the video's own loss stays within a fifth",
        now < 1.2 * was,
        f"{now / was - 1:+.1%}",
        "a lower learning rate, or --train text; the table by tenth in report.html",
    )
    yield (
        "no step was left out",
        skipped == 0,
        f"{skipped} steps",
        "the clips that the log names",
    )


def main(argv=None):
    parser = Parser(prog="wan.smoke", description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="tiny clips and a tiny Wan, made in OUT")
    add("--data", help="a folder that wan.prepare wrote")
    add("--init", help="Wan2.1, path or hub id")
    add("--out", default="runs/smoke", help="a new folder (default: %(default)s)")
    add("--steps", type=int, default=400, help="of training (default: %(default)s)")
    flags, rest = parser.parse_known_args(argv)
    out = Path(flags.out)
    try:
        asked = [bool(flags.data), bool(flags.init)]
        if asked != ([False] * 2 if flags.tiny else [True] * 2):
            raise ValueError("wanted either --tiny, or --data and --init")
        if flags.steps < 8:
            raise ValueError(f"--steps is {flags.steps}, wanted at least 8")
        if out.exists():
            raise ValueError(f"--out is {out}, which exists: wanted a new folder")
        check_folder(out)
    except ValueError as error:
        fail("wan.smoke", error)
    stages = ["--stages", "recall,refine", "--init", "none", "--out", flags.out]
    train.parse([*stages, *rest])  # ends here where a flag is wrong, before anything is made
    try:
        here = make_tiny(out) if flags.tiny else ["--data", flags.data, "--init", flags.init]
    except OSError as error:  # where another call was quicker, or the disk is full
        fail("wan.smoke", error)
    run = out / "run"
    steps = f"--recall-steps {flags.steps // 4} --refine-steps {flags.steps - flags.steps // 4}"
    usual = f"{steps} --warmup 20 --log-every 5 --val-every {flags.steps} --eval-clips 0"
    usual += f" --refine-p-drop 0.5 {TINY if flags.tiny else ''}"
    train.main([*here, "--out", str(run), *usual.split(), *rest])
    if not (run / "refine").is_dir():
        sys.exit("wan.smoke: stopped before its end, nothing is known")
    told, share = read_back(run / "refine", train.make_world(here[1], seed=0))
    for written, wanted in told:
        print(f"\nwanted:  {wanted}\nwritten: {written}")
    log, validations = (read_lines(run / f"{name}.jsonl") for name in ("metrics", "validation"))
    found = [*checks(log, validations, share)]
    if flags.tiny:
        del found[2]  # its generator is random, and knows nothing that it could lose
    for what, holds, figures, look in found:
        hint = "" if holds else f"; look at {look}"
        print(f"{'passed' if holds else 'failed'}: {what}: {figures}{hint}")
    failed = sum(not holds for _, holds, *_ in found)
    print(f"{failed or 'none'} of {len(found)} checks failed; {run}/report.html shows more")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
