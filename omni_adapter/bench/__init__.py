"""How fast a talker is on this machine: each part alone, or its modes beside the published implementation.

A talker, or a name with random weights of true size, in; figures out, as data, tables and curves.

    machine.py     what the machine is, and what the process holds of its memory
    presets.py     talkers of known sizes with random weights
    parts.py       ``bench``: encoder, prefill, steps, codec, a whole reply

A file imports from those above it.
"""

from omni_adapter.bench.parts import MEASURES, BenchSettings, Report, Timing, measure, show
from omni_adapter.bench.presets import PRESETS, Preset, load_talker, random_talker

__all__ = [
    "MEASURES",
    "PRESETS",
    "BenchSettings",
    "Preset",
    "Report",
    "Timing",
    "load_talker",
    "measure",
    "random_talker",
    "show",
]
