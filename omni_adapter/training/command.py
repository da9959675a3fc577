"""The command line of a recipe: words in, settings out.

Knows nothing of talkers, data or processes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omni_adapter.errors import ConfigError
from omni_adapter.training.settings import TrainSettings, load_settings
from omni_adapter.training.stages import get_stage

_USAGE = """usage: accelerate launch recipes/{recipe} [--config FILE] [--dry-run] [--base ID | --start TALKER]
                        [--data PATH ...] [KEY=VALUE ...]

Every key of the YAML can be given as KEY=VALUE, --KEY=VALUE or --KEY VALUE, for example optim.num_steps=100.
--dry-run shows all settings, what learns, memory and lengths, tries one step, and keeps nothing.
The same command goes on after a stop. Keys and what they mean: omni_adapter/training/settings.py
"""


class Command(NamedTuple):
    """What a command line asks for."""

    settings: TrainSettings
    dry_run: bool


def read_command(stage: str, words: Sequence[str], *, also: Sequence[str] = ()) -> Command:
    """Read the words of a command line.

    Raises:
        ConfigError: if a key or value is wrong, or the settings are for another recipe.
    """
    rest, path, is_dry = list(words), None, False
    if "--help" in rest or "-h" in rest:
        sys.stdout.write(_USAGE.format(recipe=Path(sys.argv[0]).name))
        sys.exit(0)
    if "--dry-run" in rest:
        rest.remove("--dry-run")
        is_dry = True
    for word in [word for word in rest if word.partition("=")[0] == "--config"]:
        place = rest.index(word)
        if "=" not in word and place + 1 == len(rest):
            raise ConfigError("--config needs the name of a YAML file")
        path = Path(word.partition("=")[2] or rest.pop(place + 1))
        rest.pop(place)
    settings = load_settings(path, rest, stage=stage)
    get_stage(settings.stage)
    if settings.stage not in (stage, *also):
        raise ConfigError(
            f"these settings are for the stage {settings.stage!r}, this recipe trains "
            f"{' or '.join((stage, *also))}; take the recipe that the first lines of the YAML name"
        )
    if settings.model.base is None and settings.model.start is None:
        raise ConfigError("no model: give --base ID for a new talker, or --start FOLDER to go on with one")
    if not settings.data.sources:
        raise ConfigError("no data: give --data PATH, as often as there are sources")
    return Command(settings, is_dry)
