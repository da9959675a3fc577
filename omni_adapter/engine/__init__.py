"""Weights repacked for the machine: the same model, whose products are quicker and take less memory.

A model in, the same one out, with a report of what was done and how far its results moved. Public operators
of torch do the work, and where the machine has a C compiler, calls compiled for it; no model family is known.
Knows nothing of decoding.

    arena.py      memory in large pages for weights
    products.py   weights in tiles, multiplied in one compiled call
    kernels.py    one matrix times some rows, in each way that this machine has
    linears.py    layers with a kernel instead of a weight; one product for siblings
    selection.py  the quickest kernel for a shape, by trying
    precision.py  what was asked for and what the machine has
    memory.py     pages of mapped checkpoints, given back after use
    rehearsal.py  which layers others can stand in for
    glue.py       what lies between the products of a step, each in one call
    quick.py      a layer's step: its products and those calls
    recognise.py  which layers compute just that
    pack.py       ``pack``, which puts them together

A file imports from those above it.
"""

from omni_adapter.engine.kernels import KERNELS
from omni_adapter.engine.linears import PackedLinear
from omni_adapter.engine.memory import let_go
from omni_adapter.engine.pack import PackReport, PackSettings, light, pack, relative_error
from omni_adapter.engine.precision import PRECISIONS, Precision, choose_precision

__all__ = [
    "KERNELS",
    "PRECISIONS",
    "PackReport",
    "PackSettings",
    "PackedLinear",
    "Precision",
    "choose_precision",
    "let_go",
    "light",
    "pack",
    "relative_error",
]
