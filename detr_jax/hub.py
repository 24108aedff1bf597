"""The Hugging Face hub: downloads, from its cache where that has them, and uploads.

Its client is imported when it is needed, because that takes as long as much of the rest.
"""

import re
from pathlib import Path

from detr_jax.errors import InputError, MissingFileError, OutputError

PREFIX = "hf://"
"""Says that a name is that of a repository, also where a folder has the name of its owner."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (".pth", ".pt", ".bin", ".safetensors")


def is_id(name: str | Path) -> bool:
    """Whether a name is that of a repository, "owner/name", and not meant as a path.

    It is a path where the folder before the slash exists or is `runs`, and where it ends like a file of weights.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return _ID.fullmatch(text.removeprefix(PREFIX)) is not None
    if _ID.fullmatch(text) is None or Path(text).suffix in _FILES:
        return False
    return not (Path(text).parent.is_dir() or Path(text).parent == Path("runs"))


def download(repository: str, revision: str | None = None, *, filename: str, remedy: str) -> Path:
    """One file of a repository.

    Args:
        repository: "owner/name", also behind `PREFIX`.
        revision: a commit, branch or tag.
        filename: in the repository.
        remedy: what else the user can do, for the error.

    Raises:
        MissingFileError: if it is neither in the cache nor can be downloaded.
    """
    from huggingface_hub import hf_hub_download

    repository = repository.removeprefix(PREFIX)
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except Exception as error:  # what a failed transfer raises has no base class of its own, and changes by version
        raise _unreachable(filename, repository, revision, error, remedy) from error


def download_folder(repository: str, revision: str | None = None, *, patterns: list[str], remedy: str) -> Path:
    """The folder with those files of a repository that match one of the patterns; arguments and errors as above."""
    from huggingface_hub import snapshot_download

    repository = repository.removeprefix(PREFIX)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise _unreachable(f"one of {', '.join(patterns)}", repository, revision, error, remedy) from error


def upload(path: Path, repository: str, filename: str, *, private: bool, message: str) -> str:
    """Puts one file into a repository, which is made if it does not exist; the address of the commit.

    Raises:
        InputError: if that is no id of a repository.
        OutputError: if the hub cannot be reached or refuses; mostly because nobody is logged in.
    """
    from huggingface_hub import HfApi

    repository = repository.removeprefix(PREFIX)
    if _ID.fullmatch(repository) is None:
        raise InputError(f"{repository!r} is no id of a repository; it should be like 'owner/name'")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_file(
            path_or_fileobj=path, path_in_repo=filename, repo_id=repository, commit_message=message
        )
    except Exception as error:
        raise OutputError(
            f"{filename} could not be pushed to {repository}: {error}\nLog in with `hf auth login`, by a token that "
            "may write there"
        ) from error
    return str(commit.commit_url)


def _unreachable(wanted: str, repository: str, revision: str | None, error: Exception, remedy: str) -> MissingFileError:
    from huggingface_hub import constants

    at = f" at revision {revision}" if revision else ""
    return MissingFileError(
        f"{wanted} of {repository}{at} is not in the hub's cache ({constants.HF_HUB_CACHE}) and could not be "
        f"downloaded: {error}\nGo online once (HF_HUB_OFFLINE must not be set), point HF_HOME to a cache that has it, "
        f"or {remedy}"
    )
