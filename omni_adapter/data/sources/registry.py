"""Published data sets by name, and what a source's settings mean by one.

Settings in, recipe and part out. Knows nothing of files but whether one is there.

    --data voiceassistant-400k             its usual part, from the Hub
    --data librispeech:train.clean.100     another part
    --data '{path: copies/va, recipe: voiceassistant-400k:identity}'     a copy on this disk

Names win over data sets of the Hub, files over names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from omni_adapter.data.sources.adapt import Chosen
from omni_adapter.data.sources.alpaca import ALPACA
from omni_adapter.data.sources.audio_text import AUDIO_TEXT
from omni_adapter.data.sources.librispeech import LIBRISPEECH
from omni_adapter.data.sources.libritts import LIBRITTS
from omni_adapter.data.sources.ljspeech import LJSPEECH
from omni_adapter.data.sources.moss import MOSS
from omni_adapter.data.sources.multilingual_librispeech import MULTILINGUAL_LIBRISPEECH
from omni_adapter.data.sources.open_orca import OPEN_ORCA
from omni_adapter.data.sources.recipe import Recipe
from omni_adapter.data.sources.slam_omni import BELLE, ULTRACHAT, VOICEASSISTANT_SLAM_OMNI
from omni_adapter.data.sources.spec import SourceSpec, nearest
from omni_adapter.data.sources.vctk import VCTK
from omni_adapter.data.sources.voiceassistant import VOICEASSISTANT
from omni_adapter.errors import DataError

SOURCES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        VOICEASSISTANT, VOICEASSISTANT_SLAM_OMNI, ULTRACHAT, BELLE, LIBRITTS, VCTK, LIBRISPEECH,
        MULTILINGUAL_LIBRISPEECH, LJSPEECH, OPEN_ORCA, MOSS, ALPACA, AUDIO_TEXT,
    )
}  # fmt: skip
"""Every published data set that has a name here."""


def choose(spec: SourceSpec) -> Chosen | None:
    """Return the published data set, and the part of it, that a source names; None if it names none.

    Raises:
        DataError: if a name is unknown; the nearest is named.
    """
    if spec.recipe is not None:
        return _find(spec.recipe)
    name = spec.path.partition(":")[0]
    if "/" in spec.path or "*" in spec.path or Path(spec.path).exists():
        return None
    if name in SOURCES:
        return _find(spec.path)
    advice = nearest(name, SOURCES)
    if advice.startswith("did you mean"):
        raise DataError(f"no file or published data set is called {name!r}; {advice}")
    return None


def licences(specs: Iterable[SourceSpec]) -> dict[str, str]:
    """Return what is public of a mixture: ids or names of its data sets, and the licence of each.

    Files of one's own are left out: what they are called is nobody's business.
    """
    found: dict[str, str] = {}
    for spec in specs:
        chosen = choose(spec)
        if chosen is not None:
            name = chosen.part.hub_id or chosen.recipe.hub_id
            if name is not None or chosen.recipe is not AUDIO_TEXT:
                found[name or chosen.recipe.name] = chosen.recipe.licence
        elif spec.path.count("/") == 1 and "*" not in spec.path and not Path(spec.path).exists():
            found[spec.path] = "see its card"
    return found


def hint(spec: SourceSpec) -> str:
    """Return how to read a data set of the Hub that has a name here, "" if it has none."""
    name = next((name for name, recipe in SOURCES.items() if recipe.hub_id == spec.path), None)
    return f"; its columns are known under the name {name}" if name else ""


def _find(name: str) -> Chosen:
    recipe_name, _, part = name.partition(":")
    if recipe_name not in SOURCES:
        raise DataError(f"no published data set is called {recipe_name!r}; {nearest(recipe_name, SOURCES)}")
    recipe = SOURCES[recipe_name]
    if part and part not in recipe.parts:
        raise DataError(f"{recipe_name} has no part {part!r}; {nearest(part, recipe.parts)}")
    return Chosen(recipe, part or recipe.usual_part)
