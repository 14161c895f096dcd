"""The square of both clocks as a page: what the network is given at each point, what it guesses.

python -m toy.square --checkpoint runs/toy/refine --out square.html

A point is a pair of clocks, (tau_v, tau_t). There a clip and its caption are mixed with noise, the
same at all points, as in training; the network sees both and the prompt, and says where each one
is heading. The page is one file and needs no server.
"""

import base64
import io
import sys
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from engine import pages
from engine.checkpoint import read_options
from engine.files import check_writable, one_line, write_text
from engine.options import Parser, run_command
from engine.trajectory import snapshot, words
from engine.video import to_pixels
from sample import default_checkpoint, open_checkpoint
from univigu import clock_grid, interpolate, noise_like, sample_clocks

POINTS = 11  # along each clock
CLIPS = 3  # the first of split "seen"
CELLS = 25  # of the picture of training's density, along each clock
DRAWS = 10**6  # pairs of clocks that it is made of
NO_PROMPT, WRONG = "no prompt", "another clip's prompt"


def parse(argv):
    parser = Parser(
        prog="toy.square", usage="python -m %(prog)s [--flag value ...]", description=__doc__
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        help="a folder that train.py wrote (default: runs/toy/refine, or where nothing was trained "
        "yet, the toy that came with the code)",
    )
    add("--out", default="square.html", help="the page (default: square.html)")
    return parser.parse_args(argv)


@torch.no_grad()
def explore(model, world, clip, prompts):
    """What there is to show of a clip: a dict of

    "given": pictures of the noisy video, a row, a column a tau_v; "words": the noisy text's, by
    tau_t; "guesses": for each prompt, "prompt", "video", pictures, a row a tau_t, and "text" and
    "sure", by tau_t and tau_v. prompts: name -> c (1, L, width).
    """
    batch = world.dataset("seen").__getitems__([clip])
    z_v1, y = batch["z_v"], batch["caption"]
    z_v0 = noise_like(z_v1, torch.Generator().manual_seed(clip))
    taus = torch.linspace(0, 1, POINTS)
    z_v, _ = interpolate(z_v0, z_v1, taus)  # (POINTS, C, F, H, W)
    z_t = []
    for tau in taus.split(1):  # one noise for all
        z_t.append(model.text_flow.corrupt(model, y, tau, torch.Generator().manual_seed(clip))[0])
    found = {
        "given": atlas(world.codec.decode(z_v)),
        "words": [words(world, model.decode(z)[0]) for z in z_t],
        "guesses": [],
    }
    for name, c in prompts.items():
        frames, texts, sure = [], [], []
        for tau, z in zip(taus.split(1), z_t):  # a row: all tau_v
            z = z.expand(POINTS, *z.shape[1:])
            v_v, v_t = model(z_v, z, taus, tau.expand(POINTS), c.expand(POINTS, -1, -1))
            row = [
                snapshot(model, tau_v.item(), tau.item(), *(x[None] for x in of))
                for tau_v, *of in zip(taus, z_v, z, v_v, v_t)
            ]
            frames.append(world.codec.decode(torch.cat([of.z_v1_hat for of in row])))
            texts.append([words(world, of.y_hat) for of in row])
            sure.append([[round(s, 2) for s in of.sure] for of in row])
        guess = {"prompt": name, "video": atlas(torch.cat(frames)), "text": texts, "sure": sure}
        found["guesses"].append(guess)
    return found


def atlas(frames):
    """Videos (n POINTS, 3, T, H, W) -> one picture, POINTS a row, three frames a row of each."""
    videos = torch.stack([torch.from_numpy(to_pixels(video)) for video in frames])
    pattern = "(r c) (a b) h w rgb -> (r a h) (c b w) rgb"
    file = io.BytesIO()
    picture = rearrange(videos, pattern, c=POINTS, b=3).numpy()
    Image.fromarray(picture).save(file, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def density(clocks, config):
    """How often training is where: (CELLS, CELLS), by tau_t and tau_v, 0 to 1. The fourth
    root of it: what lies on a line is far denser than what fills the square."""
    shifts = {"text_shift": config.text_shift, "joint_shift": config.joint_shift}
    g = torch.Generator().manual_seed(0)
    drawn = sample_clocks(clocks, DRAWS, generator=g, **shifts)
    row, column = ((t * CELLS).long().clamp(max=CELLS - 1) for t in (drawn.tau_t, drawn.tau_v))
    counts = torch.bincount(row * CELLS + column, minlength=CELLS**2).view(CELLS, CELLS)
    return (counts / counts.max()).pow(0.25)


def walks(model, world):
    """Mode -> the points (tau_v, tau_t) that its sampler passes."""

    def grid(mode, shift, times=1.0):
        of = world.sampling[mode]
        return clock_grid(of["steps"], of.get("shift", shift) * times)

    cfg = model.config
    return {
        "understand": [(1.0, tau) for tau in grid("understand", cfg.text_shift)],
        "generate": [(tau, 1.0) for tau in grid("generate", 1.0)],
        "joint": list(zip(grid("joint", 1.0), grid("joint", 1.0, cfg.joint_shift))),
    }


def page(checkpoint):
    """The text of the page. Raises ValueError for a checkpoint without text or of another world."""
    world, name = checkpoint.world, checkpoint.world.state["world"]
    if name not in ("toy", "pairs") or checkpoint.stage != "refine":
        found = f"of stage {checkpoint.stage} in the world {name!r}"
        raise ValueError(
            f"{checkpoint.name} is {found}, wanted stage refine in 'toy' or 'pairs': its texts"
        )
    model = checkpoint.load()
    batch = world.dataset("seen").__getitems__(range(CLIPS + 1))
    prompts, captions = (world.tokenizer.decode(batch[text]) for text in ("prompt", "caption"))
    clips = []
    for i in range(CLIPS):
        c, other = batch["c"][i : i + 1], batch["c"][i + 1 : i + 2]
        of = {prompts[i]: c, NO_PROMPT: torch.zeros_like(c), f"{WRONG}: {prompts[i + 1]}": other}
        clips.append({"caption": captions[i]} | explore(model, world, i, of))
    often = density(read_options(Path(checkpoint.source))["clocks"], checkpoint.config)
    data = {
        "points": POINTS,
        "clips": clips,
        "density": [[round(x, 2) for x in row] for row in often.tolist()],
        "walks": walks(model, world),
        "unsure": pages.UNSURE,
    }
    height, width = world.frame_shape[2:]
    template = pages.TEMPLATES.get_template("square.html")
    return template.render(title="The square of the two clocks", data=data, h=height, w=width)


def main(argv=None):
    flags = parse(argv)
    try:
        check_writable(Path(flags.out))
        name = flags.checkpoint or default_checkpoint()
        text = page(open_checkpoint(name, None, torch.device("cpu")))
        write_text(Path(flags.out), text)
    except (ValueError, OSError, LookupError) as error:
        sys.exit(f"toy.square: error: {one_line(error)}")
    print(f"{flags.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
