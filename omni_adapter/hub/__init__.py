"""Load parts by name, save and load what was added, share it.

Folders and Hub ids in, parts out, and back. Only safetensors and JSON are read and written; a base, encoder
or codec that is not the one a checkpoint was made with is refused. Knows nothing of decoding or training.

    files.py     what a talker's files are called; JSON of strangers
    options.py   where to look, and what a name stands for there
    parts.py     base, encoder and codec by name; is it the one the talker was made with?
    adapters.py  the adapter of PEFT that a base comes with
    atomic.py    a saved talker is replaced whole or not at all
    loading.py   a saved talker's config, added weights and LoRA, checked
    saving.py    the same, written, with its card
    sharing.py   a saved talker as one commit of a repository

A file imports from those above it.
"""

from omni_adapter.hub.adapters import load_adapter, split_base
from omni_adapter.hub.atomic import replacing
from omni_adapter.hub.files import BASE_ADAPTER, CONFIG_FILE, PARTS, TINY_TALKER, read_datasets
from omni_adapter.hub.loading import fetch_folder, load_added, part_location, read_config
from omni_adapter.hub.options import HubOptions, sort_arguments
from omni_adapter.hub.parts import (
    check_fingerprint,
    check_geometry,
    load_base,
    load_codec,
    load_encoder,
    load_tokenizer,
    read_lm_config,
)
from omni_adapter.hub.saving import parts_inside, plain_lm, save_added, save_card, save_parts
from omni_adapter.hub.sharing import PushOptions, push_folder

__all__ = [
    "BASE_ADAPTER",
    "CONFIG_FILE",
    "PARTS",
    "TINY_TALKER",
    "HubOptions",
    "PushOptions",
    "check_fingerprint",
    "check_geometry",
    "fetch_folder",
    "load_adapter",
    "load_added",
    "load_base",
    "load_codec",
    "load_encoder",
    "load_tokenizer",
    "part_location",
    "parts_inside",
    "plain_lm",
    "push_folder",
    "read_config",
    "read_datasets",
    "read_lm_config",
    "replacing",
    "save_added",
    "save_card",
    "save_parts",
    "sort_arguments",
    "split_base",
]
