"""Push a saved talker: a folder in, one commit of a repository out.

Sends the talker's own files and no others, with a card that says what the folder holds. Loads no model.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from omni_adapter.config import OmniConfig
from omni_adapter.errors import CheckpointError
from omni_adapter.hub.files import (
    BASE_ADAPTER,
    CONFIG_FILE,
    FACT_FILES,
    FEATURES_FILE,
    LORA_FOLDER,
    PART_SUFFIXES,
    PARTS,
    WEIGHTS_FILE,
    read_datasets,
    read_figures,
)
from omni_adapter.hub.loading import fetch_folder, read_config
from omni_adapter.hub.options import HUB_ERRORS, HubOptions
from omni_adapter.model_card import (
    CARD_FILE,
    SAMPLE_SUFFIXES,
    SAMPLES_FOLDER,
    CardFacts,
    is_own_card,
    make_card,
)
from omni_adapter.tensor_files import num_elements

_OWN_FOLDERS = (LORA_FOLDER, SAMPLES_FOLDER, *PARTS, BASE_ADAPTER)


@dataclass(frozen=True)
class PushOptions:
    """How to push; names and meanings are those of huggingface_hub.

    Attributes:
        token: access token; None for the one that was logged in with.
        private: whether a new repository is private; None takes the account's default.
        revision: branch, made if missing.
        commit_message: first line of the commit.
    """

    token: str | None = None
    private: bool | None = None
    revision: str | None = None
    commit_message: str = "Upload talker"


def push_folder(folder: Path, repo_id: str, *, options: PushOptions) -> str:
    """Make a saved talker the content of a repository, as one commit, and return the commit's address.

    The card is made of what the folder holds now: config, ``evaluation.json``, ``datasets.json`` and
    ``samples/``; a card that its owner wrote is sent as it is. Files of an earlier talker that this one lacks
    are deleted by the same commit; files of others stay, there and here.

    Raises:
        CheckpointError: if the folder holds no talker or a part is a folder of this machine; if the Hub
            refuses, the connection breaks, or the repository changes meanwhile.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; pass one in which a talker was saved")
    config = read_config(fetch_folder(folder, options=HubOptions()))
    _check_shareable(config)
    files = _own_files(folder)
    contents: dict[str, Path | bytes] = {**files, CARD_FILE: _card(folder, repo_id, config, files)}
    api = HfApi(token=options.token, library_name="omni-adapter")
    revision = options.revision
    try:
        repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        present = [file.rfilename for file in before.siblings or ()]
        # Not upload_folder: it makes several commits of a large folder, and each would be half a talker.
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationDelete(name) for name in _stale_files(present, contents)),
                *(CommitOperationAdd(name, content) for name, content in sorted(contents.items())),
            ],
            commit_message=options.commit_message,
            revision=revision,
            parent_commit=before.sha,
        )
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"the talker was not pushed to {repo_id}: {error}; the repository holds what it held before, and "
            "pushing again sends it whole"
        ) from error
    return str(commit.commit_url)


def _own_files(folder: Path) -> dict[str, Path]:
    """Files that belong to the talker in ``folder``, by their names in a repository."""
    patterns = [
        *(CONFIG_FILE, WEIGHTS_FILE, FEATURES_FILE, *FACT_FILES),
        *(f"{part}/*.{suffix}" for part in (LORA_FOLDER, BASE_ADAPTER, *PARTS) for suffix in PART_SUFFIXES),
        *(f"{SAMPLES_FOLDER}/*{suffix}" for suffix in SAMPLE_SUFFIXES),
    ]
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _card(folder: Path, name: str, config: OmniConfig, files: Collection[str]) -> bytes:
    """The card of the talker in ``folder``, for a repository called ``name``."""
    path = folder / CARD_FILE
    if path.is_file() and not is_own_card(text := path.read_text(encoding="utf-8", errors="replace")):
        return text.encode()
    weights = [name for name in files if name == WEIGHTS_FILE or name.startswith(f"{LORA_FOLDER}/")]
    facts = CardFacts(
        name,
        sum(num_elements(folder / name) for name in weights if name.endswith(".safetensors")),
        evaluation=read_figures(folder),
        samples=[name for name in files if name.startswith(f"{SAMPLES_FOLDER}/")],
        datasets=read_datasets(folder),
    )
    return make_card(config, facts).encode()


def _stale_files(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of an earlier talker in a repository that the new one does not have."""
    if CONFIG_FILE not in present:
        return []
    own = [
        name for name in present if name in FACT_FILES or ("/" in name and name.split("/")[0] in _OWN_FOLDERS)
    ]
    return sorted(set(own) - set(new))


def _check_shareable(config: OmniConfig) -> None:
    for part in (*PARTS, BASE_ADAPTER):
        ref = getattr(config, part)
        name = ref.id if ref else ""
        if Path(name).is_absolute():
            raise CheckpointError(
                f"the {part} is {name} on this machine, which others cannot load; "
                f"pass include=({part!r},) to push it too, or wrap it by its Hub id"
            )
