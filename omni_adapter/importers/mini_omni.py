"""The released Mini-Omni: its litgpt checkpoint as a talker (https://github.com/gpt-omni/mini-omni)."""

from collections.abc import Collection

from omni_adapter.errors import CheckpointError
from omni_adapter.importers.port import ImportOptions, Source
from omni_adapter.talker import OmniAdapter


class MiniOmniImporter:
    """Reads ``lit_model.pth`` and ``model_config.yaml``."""

    summary = "Mini-Omni: lit_model.pth, model_config.yaml, tokenizer files, and small.pt if it is there"
    takes: Collection[str] = frozenset({"encoder", "codec"})
    files: Collection[str] = ("lit_model.pth", "model_config.yaml", "small.pt", "*.json", "merges.txt")

    def read(self, source: Source, *, options: ImportOptions) -> OmniAdapter:
        """Return the checkpoint as a talker."""
        raise CheckpointError(f"{source.name} cannot be read yet")
