"""Other people's checkpoints as talkers: one file for each project, behind one port.

The name of an importer and a folder or Hub id in, a talker out.

    port.py        what an importer is, and what all of them need
    mini_omni.py   the released Mini-Omni
    slam_omni.py   SLAM-Omni in Mini-Omni mode
    ultravox.py    Ultravox's projectors: hearing only
"""

from collections.abc import Mapping
from pathlib import Path

from omni_adapter.errors import ConfigError
from omni_adapter.importers.mini_omni import MiniOmniImporter
from omni_adapter.importers.port import Importer, ImportOptions, run_importer
from omni_adapter.importers.slam_omni import SlamOmniImporter
from omni_adapter.importers.ultravox import UltravoxImporter
from omni_adapter.talker import OmniAdapter

__all__ = ["IMPORTERS", "ImportOptions", "Importer", "import_talker"]

IMPORTERS: Mapping[str, Importer] = {
    "mini-omni": MiniOmniImporter(),
    "slam-omni": SlamOmniImporter(),
    "ultravox": UltravoxImporter(),
}
"""Every importer, by the name that the command ``omni-adapter import`` knows."""


def import_talker(name: str, source: str | Path, *, options: ImportOptions | None = None) -> OmniAdapter:
    """Read a published checkpoint as a talker.

    Args:
        name: key of ``IMPORTERS``.
        source: folder, file or Hub id of the checkpoint.
        options: what to import with.

    Raises:
        ConfigError: if there is no such importer, or an option or the checkpoint cannot be used.
        CheckpointError: if files are missing, broken, or do not fit each other.
    """
    if name not in IMPORTERS:
        raise ConfigError(f"no importer is called {name!r}; there are {', '.join(IMPORTERS)}")
    return run_importer(IMPORTERS[name], source, options=options or ImportOptions())
