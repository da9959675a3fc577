"""How fast a talker is on this machine: each part alone, or its modes beside the published implementation.

A talker, or a name with random weights of true size, in; figures out, as data, tables and curves.

    machine.py     what the machine is, and what the process holds of its memory
    timing.py      times that are taken in turns
    bandwidth.py   how fast memory is read, the floor under every step
    presets.py     talkers of known sizes with random weights
    parts.py       ``bench``: encoder, prefill, steps, codec, a whole reply
    reference.py   how the published implementation decodes
    modes.py       the ways in which a talker can decode here
    running.py     single steps and spoken replies of a talker
    workshop.py    what the sections of a comparison share
    speed.py       sections about steps: alone, in long replies, many at once, by size
    speech.py      sections about sound: the first of it, speaking in full, the codec
    probe.py       one mode in a process of its own
    cost.py        sections about memory, start and precision
    compare.py     ``bench --compare``: the sections, one after the other, kept in a file
    table.py       a comparison as a table
    plot.py        and as curves

A file imports from those above it.
"""

from omni_adapter.bench.compare import compare, read_comparison
from omni_adapter.bench.parts import MEASURES, BenchSettings, Report, Timing, measure, show
from omni_adapter.bench.plot import SUFFIXES as PLOT_SUFFIXES
from omni_adapter.bench.plot import plot
from omni_adapter.bench.presets import PRESETS, SHAPES, Preset, load_talker, random_talker
from omni_adapter.bench.table import show_comparison, to_markdown, update_markdown
from omni_adapter.bench.workshop import SECTIONS, CompareSettings, settings_for

__all__ = [
    "MEASURES",
    "PLOT_SUFFIXES",
    "PRESETS",
    "SECTIONS",
    "SHAPES",
    "BenchSettings",
    "CompareSettings",
    "Preset",
    "Report",
    "Timing",
    "compare",
    "load_talker",
    "measure",
    "plot",
    "random_talker",
    "read_comparison",
    "settings_for",
    "show",
    "show_comparison",
    "to_markdown",
    "update_markdown",
]
