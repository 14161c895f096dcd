"""The panels of an experiment's figure: functions (axes, numbers) that draw.

numbers: variant -> name -> (mean, spread over seeds).
"""

from matplotlib.figure import Figure
from PIL import Image


def bars(*names):
    """A group of bars for each name, a bar for each variant."""

    def draw(axes, numbers):
        width = 0.8 / len(numbers)
        for k, (variant, of) in enumerate(numbers.items()):
            x = [i + k * width for i in range(len(names))]
            mean, spread = zip(*[of.get(name, (0, 0)) for name in names])
            axes.bar(x, mean, width, yerr=spread, label=variant, color=f"C{k}")
        middle = [i + 0.4 - width / 2 for i in range(len(names))]
        axes.set_xticks(middle, names, rotation=20 if len(names) > 4 else 0, fontsize=8)

    return draw


def curve(xlabel, *names, log=False, of=()):
    """A line through the points "name @ x" for each variant (of these, or all).

    Where there are several names, they are of one variant, and each has its line.
    """

    def points(of_variant, name):
        keys = [key for key in of_variant if key.startswith(f"{name} @ ")]
        return [(float(key.split(" @ ")[1]), *of_variant[key]) for key in keys]

    def draw(axes, numbers):
        lines = {}
        for variant in filter(numbers.get, of or numbers):
            for name in names:
                label = variant if len(names) == 1 else name
                lines[label] = points(numbers[variant], name)
        draw_lines(axes, lines, xlabel, names[0] if len(names) == 1 else "", log)

    return draw


def across(xlabel, xs, *names, log=True):
    """A line for each name, a point for each variant: xs maps variants to their x."""

    def draw(axes, numbers):
        lines = {}
        for name in names:
            lines[name] = [(x, *numbers[v][name]) for v, x in xs.items() if v in numbers]
        draw_lines(axes, lines, xlabel, "", log)

    return draw


def across_groups(xlabel, name, groups):
    """As across, of one number, with a line for each group: label -> variant -> x."""

    def draw(axes, numbers):
        lines = {}
        for label, xs in groups.items():
            lines[label] = [(x, *numbers[v][name]) for v, x in xs.items() if v in numbers]
        draw_lines(axes, lines, xlabel, name, log=True)

    return draw


def draw_lines(axes, lines, xlabel, ylabel, log):
    """lines: label -> list of (x, mean, spread); one without points is left out."""
    xs = {}
    for label, points in lines.items():
        if points:
            x, mean, spread = zip(*sorted(points))
            axes.errorbar(x, mean, yerr=spread, marker=".", capsize=2, label=label)
            xs |= dict.fromkeys(x)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    if len(xs) < 9:
        axes.set_xticks(list(xs), [f"{value:g}" for value in xs])
        axes.minorticks_off()


def write_figure(path, title, panels, numbers):
    """Draws the panels side by side."""
    figure = Figure(figsize=(6 * len(panels), 3.6))  # without pyplot, no window is ever opened
    axes = figure.subplots(1, len(panels), squeeze=False)
    for draw, panel in zip(panels, axes[0]):
        draw(panel, numbers)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    few_colours = Image.open(path).convert("RGB").quantize(64)
    few_colours.save(path, optimize=True)  # a third of the size
