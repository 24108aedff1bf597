"""The Hugging Face hub: downloads, from its cache where that has them, and uploads. Its client is imported late."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_jax.errors import InputError, MissingFileError, OutputError

PREFIX = "hf://"  # before the id of a repository, also where a folder has the name of its owner
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (".pth", ".pt", ".bin", ".safetensors")


def is_id(name: str | Path) -> bool:
    """Whether a name is the id of a repository, "owner/name".

    It is a path where the folder before the slash exists or is `runs`, or where it ends like a file of weights.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return _ID.fullmatch(text.removeprefix(PREFIX)) is not None
    if _ID.fullmatch(text) is None or Path(text).suffix in _FILES:
        return False
    return not (Path(text).parent.is_dir() or Path(text).parent == Path("runs"))


def download(repository: str, revision: str | None = None, *, filename: str, remedy: str) -> Path:
    """One file of a repository, "owner/name", also behind `PREFIX`, at a commit, branch or tag.

    Raises:
        MissingFileError: if it is neither in the cache nor can be downloaded; ends with the `remedy`.
    """
    from huggingface_hub import hf_hub_download

    with _reachable(filename, repository, revision, remedy):
        return Path(hf_hub_download(repository.removeprefix(PREFIX), filename, revision=revision))


def download_folder(repository: str, *, patterns: list[str], remedy: str) -> Path:
    """A folder with the files of a repository that match one of the patterns; see `download`."""
    from huggingface_hub import snapshot_download

    with _reachable(f"one of {', '.join(patterns)}", repository, None, remedy):
        return Path(snapshot_download(repository.removeprefix(PREFIX), allow_patterns=patterns))


def upload(path: Path, repository: str, filename: str, *, private: bool, message: str) -> str:
    """Puts a file into a repository, which is made if it does not exist, and returns the address of the commit.

    Raises:
        InputError: if that is no id of a repository.
        OutputError: if the hub cannot be reached or refuses, mostly because nobody is logged in.
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


@contextmanager
def _reachable(wanted: str, repository: str, revision: str | None, remedy: str) -> Iterator[None]:
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # errors of failed transfers have no base class of their own, and change by version
        at = f" at revision {revision}" if revision else ""
        raise MissingFileError(
            f"{wanted} of {repository.removeprefix(PREFIX)}{at} is not in the hub's cache ({constants.HF_HUB_CACHE}) "
            f"and could not be downloaded: {error}\nGo online once (HF_HUB_OFFLINE must not be set), point HF_HOME "
            f"to a cache that has it, or {remedy}"
        ) from error
