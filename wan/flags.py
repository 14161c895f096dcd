"""The command lines of the two data tools: values checked where their flag is declared, and
failures that are one line."""

import argparse
import sys
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from engine.files import one_line
from engine.options import Parser

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def make_parser(program, description):
    """A tool's parser of flags."""
    usage = f"python -m {program} [--flag value ...]      --help lists the flags"
    return Parser(prog=program, usage=usage, description=description)


def checked(parse, good, wanted):
    """A type for argparse: a text becomes parse(text), refused unless good(value)."""

    def convert(text):
        try:
            value = parse(text)
            fits = good(value)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"is {text!r}, wanted {wanted}")
        return value

    return convert


def integer_pair(text, separator):
    """ "3-5" -> (3, 5). Raises ValueError for another form."""
    first, second = map(int, text.split(separator))
    return first, second


def span(text):
    return integer_pair(text, "-")


def rising(pair):
    return pair[0] <= pair[1]


def at_least(low):
    return checked(int, lambda value: value >= low, f"at least {low}")


def named(what):
    return checked(str, bool, f"the name of {what}")


SPAN = checked(span, rising, "LOW-HIGH")
FRAMES = checked(int, lambda n: n > 0 and n % 4 == 1, "4n + 1 (1, 5, 9, ...)")


@contextmanager
def failing_in_one_line(program):
    """Ends the process with one line where the block fails in a way that is no bug."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = "pip install -r requirements-wan.txt"
        sys.exit(f"{program}: error: {error.name} is not installed: {hint}")
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"{program}: error: {one_line(error)}")
