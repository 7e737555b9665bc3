"""A folder pushed to the Hub: one commit that is complete or absent, and one tag that names it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    ModelInfo,
)
from huggingface_hub.errors import HfHubHTTPError

from api.errors import HubUnavailable, InvalidRequest, ModelGated, ModelNotFound
from api.hub.base import PublishedModel
from api.hub.connection import TRANSPORT_ERROR, HubConnection
from api.hub.names import check_repo_id

__all__ = ["check_target", "publish_folder"]

CARD_FILE = "README.md"
MANIFEST_FILE = "abq_manifest.json"
"""A repository with this file was pushed by this service."""
HARMLESS = frozenset({".gitattributes", CARD_FILE})
WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")
MOVED_ON = 412
"""The branch has another head than the commit was made for."""
COMMIT_ATTEMPTS = 3
PARAM = "publish.repo_id"


def check_target(connection: HubConnection, repo_id: str, *, private: bool) -> None:
    """Refuse a target that cannot or must not be written.

    Raises:
        InvalidRequest: naming the field `publish.repo_id`.
    """
    check_repo_id(repo_id)
    if not connection.has_token:
        raise _refused("Publishing needs a Hub token; the operator sets ABQ_HUB__TOKEN.")
    with _about_target(repo_id):
        who = connection.call(connection.api.whoami)
    owner = repo_id.split("/", maxsplit=1)[0]
    names = [who.get("name"), *(each.get("name") for each in who.get("orgs") or ())]
    if owner.lower() not in {str(name).lower() for name in names}:
        known = ", ".join(str(name) for name in names)
        raise _refused(f"The Hub token cannot write to {owner}; use one of {known}.")
    info = _find_target(connection, repo_id)
    if info is not None:
        _check_existing(info, repo_id, private=private)


def publish_folder(
    connection: HubConnection, folder: Path, repo_id: str, *, private: bool, card: str, tag: str
) -> PublishedModel:
    """Push a folder; a second call with the same tag finds the first one's commit.

    Raises:
        InvalidRequest: naming the field `publish.repo_id`.
        HubUnavailable: the Hub did not answer in time.
    """
    api = connection.api
    with _about_target(repo_id):
        connection.call(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        refs = connection.call(lambda: api.list_repo_refs(repo_id))
        revision = next((each.target_commit for each in refs.tags if each.name == tag), None)
        if revision is None:
            revision = _commit_folder(connection, folder, repo_id, card=card, tag=tag)
            connection.call(
                lambda: api.create_tag(repo_id, tag=tag, revision=revision, exist_ok=True)
            )
    return PublishedModel(repo_id=repo_id, revision=revision, url=connection.url_of(repo_id))


def _commit_folder(
    connection: HubConnection, folder: Path, repo_id: str, *, card: str, tag: str
) -> str:
    for _ in range(COMMIT_ATTEMPTS):
        try:
            return connection.call(lambda: _send_commit(connection, folder, repo_id, card, tag))
        except HubUnavailable as error:
            if not _moved_on(error.__cause__):
                raise
    raise HubUnavailable(f"{repo_id} keeps changing while it is written; try again.")


def _send_commit(connection: HubConnection, folder: Path, repo_id: str, card: str, tag: str) -> str:
    info = connection.api.model_info(repo_id, timeout=connection.timeout_s)
    # somebody else may have written since the first check
    _check_existing(info, repo_id, private=False)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    # the shards of an earlier push would be loaded beside the new ones
    operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
        CommitOperationDelete(path_in_repo=each.rfilename)
        for each in info.siblings or ()
        if WEIGHTS.fullmatch(each.rfilename) and each.rfilename not in names
    ]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        for name, path in zip(names, paths, strict=True)
        if name != CARD_FILE
    ]
    operations.append(CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card.encode()))
    with _unwrapped_upload():
        commit = connection.api.create_commit(
            repo_id, operations, commit_message=f"Quantized by {tag}", parent_commit=info.sha
        )
    return str(commit.oid)


def _find_target(connection: HubConnection, repo_id: str) -> ModelInfo | None:
    try:
        return connection.call(
            lambda: connection.api.model_info(repo_id, timeout=connection.timeout_s)
        )
    except ModelNotFound:
        return None


def _check_existing(info: ModelInfo, repo_id: str, *, private: bool) -> None:
    names = {each.rfilename for each in info.siblings or ()}
    if names - HARMLESS and MANIFEST_FILE not in names:
        raise _refused(f"{repo_id} holds something else; name a repository that does not exist.")
    if private and not info.private:
        raise InvalidRequest(
            f"{repo_id} exists and is public; name another, or ask for a public push.",
            param="publish.private",
        )


@contextmanager
def _about_target(repo_id: str) -> Iterator[None]:
    """What the Hub says about the repository concerns the target here, not the source."""
    try:
        yield
    except (ModelGated, ModelNotFound) as error:
        raise _refused(f"The Hub token cannot write to {repo_id}.") from error


@contextmanager
def _unwrapped_upload() -> Iterator[None]:
    """The client wraps what goes wrong in its upload threads; bring back what it was."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, TRANSPORT_ERROR):
            raise error.__cause__ from error
        raise


def _moved_on(error: BaseException | None) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == MOVED_ON


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param=PARAM)
