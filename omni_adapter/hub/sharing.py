"""Push a saved talker: a folder in, one commit of a repository out.

Knows nothing of models: what the folder holds is sent as it is, if others can load it.
"""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from omni_adapter.errors import CheckpointError
from omni_adapter.hub.files import CONFIG_FILE, LORA_FOLDER, PARTS
from omni_adapter.hub.loading import read_config
from omni_adapter.hub.options import HUB_ERRORS
from omni_adapter.model_card import SAMPLES_FOLDER


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    commit_message: str,
    revision: str | None,
) -> str:
    """Make a saved talker the content of a repository, as one commit, and return the commit's address.

    Files of an earlier talker that this one lacks are deleted by the same commit; files of others stay.

    Raises:
        CheckpointError: if the Hub refuses, the connection breaks, or a part is a folder of this machine.
    """
    _check_shareable(folder)
    api = HfApi(token=token, library_name="omni-adapter")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        stale = _stale_files(present, new)
        # Not upload_folder: it makes several commits of a large folder, and each would be half a talker.
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, path) for name, path in sorted(new.items())),
            ],
            commit_message=commit_message,
            revision=revision,
        )
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"the talker was not pushed to {repo_id}: {error}; the repository holds what it held before, and "
            "calling push_to_hub again sends it whole"
        ) from error
    return str(commit.commit_url)


def _stale_files(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of an earlier talker in a repository that the new one does not have."""
    if CONFIG_FILE not in present:
        return []
    own = (LORA_FOLDER, SAMPLES_FOLDER, *PARTS)
    return sorted(
        name for name in present if name.partition("/")[0] in own and "/" in name and name not in new
    )


def _check_shareable(folder: Path) -> None:
    config = read_config(folder)
    for part in PARTS:
        name = getattr(config, part).id
        if Path(name).is_absolute():
            raise CheckpointError(
                f"the {part} is {name} on this machine, which others cannot load; "
                f"pass include=({part!r},) to push it too, or wrap it by its Hub id"
            )
