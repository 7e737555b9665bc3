"""A folder pushed to the Hub: one commit that is complete or absent, and one tag that names it."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from typing_extensions import override

from api.errors import HubUnavailable, InvalidRequest, ModelGated, ModelNotFound
from api.hub.base import PublishedModel, PublishTarget
from api.hub.connection import HubConnection
from api.hub.names import check_repo_id

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

__all__ = ["Push", "check_target"]

Result = TypeVar("Result")
Operations = list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy]

CARD_FILE = "README.md"
MANIFEST_FILE = "abq_manifest.json"
"""A repository with this file was pushed by this service."""
HARMLESS = frozenset({".gitattributes", CARD_FILE})
WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?")
MOVED_ON = 412
"""The branch has another head than the commit was made for."""
COMMIT_ATTEMPTS = 3


def check_target(connection: HubConnection, target: PublishTarget) -> None:
    """Refuse a target that cannot or must not be written.

    Raises:
        InvalidRequest: naming the field `publish.repo_id` or `publish.private`.
    """
    check_repo_id(target.repo_id)
    if not connection.has_token:
        raise _refused("Publishing needs a Hub token; the operator sets ABQ_HUB__TOKEN.")
    with _about_target(target):
        who = connection.call(connection.api.whoami)
    owner = target.repo_id.split("/", maxsplit=1)[0]
    names = [who.get("name"), *(each.get("name") for each in who.get("orgs") or ())]
    if owner.lower() not in {str(name).lower() for name in names}:
        known = ", ".join(str(name) for name in names)
        raise _refused(f"The Hub token cannot write to {owner}; use one of {known}.")
    try:
        info = connection.call(
            lambda: connection.api.model_info(target.repo_id, timeout=connection.timeout_s)
        )
    except ModelNotFound:
        return
    _check_contents(info, target)
    if target.private and not info.private:
        raise InvalidRequest(
            f"{target.repo_id} exists and is public; name another, or ask for a public push.",
            param="publish.private",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """One push of a folder. Running it again with the same tag finds the first one's commit."""

    connection: HubConnection
    folder: Path
    target: PublishTarget
    card: str
    tag: str
    check: Callable[[], None]
    """Asked while bytes go out; an exception from it ends the push before anything is visible."""

    def run(self) -> PublishedModel:
        """Create the repository, commit, tag.

        Raises:
            InvalidRequest: naming the field `publish.repo_id`.
            HubUnavailable: the Hub did not answer in time.
        """
        api, repo_id = self.connection.api, self.target.repo_id
        with _about_target(self.target):
            self._call(lambda: api.create_repo(repo_id, private=self.target.private, exist_ok=True))
            refs = self._call(lambda: api.list_repo_refs(repo_id))
            revision = next((ref.target_commit for ref in refs.tags if ref.name == self.tag), None)
            if revision is None:
                revision = self._commit()
                self.connection.call(
                    lambda: api.create_tag(repo_id, tag=self.tag, revision=revision, exist_ok=True)
                )
        url = self.connection.url_of(repo_id)
        return PublishedModel(repo_id=repo_id, revision=revision, url=url)

    def _commit(self) -> str:
        for _ in range(COMMIT_ATTEMPTS):
            try:
                return self._call(self._send_commit)
            except HubUnavailable as error:
                if not _moved_on(error.__cause__):
                    raise
        raise HubUnavailable(f"{self.target.repo_id} keeps changing while it is written.")

    def _send_commit(self) -> str:
        api, repo_id = self.connection.api, self.target.repo_id
        info = api.model_info(repo_id, timeout=self.connection.timeout_s)
        # somebody else may have written since the first check
        _check_contents(info, self.target)
        with ExitStack() as files, _unwrapped_upload():
            operations = self._list_operations(info, files)
            # large files first, then everything becomes visible at once
            api.preupload_lfs_files(
                repo_id,
                additions=[each for each in operations if isinstance(each, CommitOperationAdd)],
                free_memory=False,
            )
            self.check()
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=f"Quantized by {self.tag}",
                parent_commit=info.sha,
            )
        return str(commit.oid)

    def _list_operations(self, info: "ModelInfo", files: ExitStack) -> Operations:
        paths = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        # the shards of an earlier push would be loaded beside the new ones
        operations: Operations = [
            CommitOperationDelete(path_in_repo=each.rfilename)
            for each in info.siblings or ()
            if WEIGHTS.fullmatch(each.rfilename) and each.rfilename not in paths
        ]
        for name, path in paths.items():
            if name != CARD_FILE:
                content = files.enter_context(_CheckedFile(path, self.check))
                operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
        card = self.card.encode()
        operations.append(CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card))
        return operations

    def _call(self, request: Callable[[], Result]) -> Result:
        return self.connection.call(request, self.connection.new_patience(self.check))


class _CheckedFile(io.BufferedReader):
    """A file whose readers can be stopped: the client has no other way to end an upload."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        super().__init__(io.FileIO(path))
        self._check = check

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def _check_contents(info: "ModelInfo", target: PublishTarget) -> None:
    names = {each.rfilename for each in info.siblings or ()}
    if names - HARMLESS and MANIFEST_FILE not in names:
        raise _refused(
            f"{target.repo_id} holds something else; name a repository that does not exist."
        )


@contextmanager
def _about_target(target: PublishTarget) -> Iterator[None]:
    """What the Hub says about the repository concerns the target here, not the source."""
    try:
        yield
    except (ModelGated, ModelNotFound) as error:
        raise _refused(f"The Hub token cannot write to {target.repo_id}.") from error


@contextmanager
def _unwrapped_upload() -> Iterator[None]:
    """The client wraps what goes wrong in its upload threads; bring back what it was."""
    try:
        yield
    except RuntimeError as error:
        raise (error.__cause__ or error) from error


def _moved_on(error: BaseException | None) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == MOVED_ON


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="publish.repo_id")
