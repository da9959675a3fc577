"""Copies of published data sets, and a Hub that consists of them."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.sources.miniatures import PUBLISHED


@pytest.fixture(scope="session")
def copies(tmp_path_factory) -> dict[str, Path]:
    """A copy of every published data set, by its id on the Hub."""
    top = tmp_path_factory.mktemp("published")
    folders = {hub_id: top / hub_id.replace("/", "--") for hub_id in PUBLISHED}
    for hub_id, folder in folders.items():
        PUBLISHED[hub_id].make(folder)
    return folders


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What datasets converts goes to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hub(copies, monkeypatch) -> list[str]:
    """Let ids of the Hub mean the copies; what is asked for is written down."""
    load, asked = datasets.load_dataset, []

    def load_copy(path: str, *arguments: Any, **keywords: Any) -> Any:
        if path in copies:
            asked.append(path)
            keywords.pop("revision", None)
        return load(str(copies.get(path, path)), *arguments, **keywords)

    monkeypatch.setattr(datasets, "load_dataset", load_copy)
    return asked
