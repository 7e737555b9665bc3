"""Models of a Hugging Face Hub, through the huggingface_hub client."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelInfo
from typing_extensions import override

from api.errors import HubUnavailable, ModelNotFound
from api.hub.base import (
    ModelFacts,
    ModelHub,
    OnProgress,
    PublishedModel,
    PublishTarget,
    RemoteFile,
    ResolvedModel,
)
from api.hub.connection import HubConnection
from api.hub.inspection import inspect_model
from api.hub.names import check_model_id, check_revision
from api.hub.publication import Push, check_target
from api.hub.transfer import OnBytes, Transfer

__all__ = ["HuggingFaceHub"]


class HuggingFaceHub(ModelHub):
    """A `ModelHub` over HTTP. Threads may share it; the token never leaves its connection."""

    def __init__(self, connection: HubConnection) -> None:
        self._connection = connection

    @override
    def resolve(self, model: str, revision: str | None) -> ResolvedModel:
        """Ask for the commit, its files and the licence; for gated models also for access."""
        check_model_id(model)
        if revision is not None:
            check_revision(revision)
        connection = self._connection
        info = connection.call(
            lambda: connection.api.model_info(
                model, revision=revision, files_metadata=True, timeout=connection.timeout_s
            )
        )
        if info.disabled:
            raise ModelNotFound("The Hub has disabled this model.", param="model")
        if info.gated:
            connection.call(lambda: connection.api.auth_check(model))
        return _to_resolved(model, info)

    @override
    def inspect(self, resolved: ResolvedModel) -> ModelFacts:
        """Read headers by range."""
        return inspect_model(
            resolved,
            lambda path, start, length: self._connection.read(resolved, path, start, length),
        )

    @override
    def download(self, resolved: ResolvedModel, folder: Path, on_progress: OnProgress) -> None:
        """Fetch over HTTP; an interrupted file goes on where it stopped."""
        facts = self.inspect(resolved)
        transfer = Transfer(
            lambda file, part, on_bytes: self._fetch(resolved, file, part, on_bytes), folder
        )
        transfer.run(facts.fetched_files, on_progress)

    @override
    def check_target(self, target: PublishTarget) -> None:
        """Ask who the token is and what the repository holds."""
        check_target(self._connection, target)

    @override
    def publish(
        self,
        folder: Path,
        target: PublishTarget,
        *,
        card: str,
        tag: str,
        check: Callable[[], None],
    ) -> PublishedModel:
        """Push with one commit and one tag."""
        self.check_target(target)
        push = Push(
            connection=self._connection,
            folder=folder,
            target=target,
            card=card,
            tag=tag,
            check=check,
        )
        return push.run()

    def _fetch(
        self, resolved: ResolvedModel, file: RemoteFile, part: Path, on_bytes: OnBytes
    ) -> None:
        part.touch()
        if part.stat().st_size > file.bytes:
            part.unlink()
            part.touch()
        patience = self._connection.new_patience(lambda: on_bytes(part.stat().st_size))

        def append() -> None:
            have = part.stat().st_size
            stream = self._connection.stream(resolved, file.path, have)
            with stream as (start, chunks), part.open("r+b") as content:
                content.seek(start)
                content.truncate()
                for chunk in chunks:
                    content.write(chunk)
                    patience.renew()
                    _note(content.tell(), file, on_bytes)

        while (have := part.stat().st_size) < file.bytes:
            self._connection.call(append, patience)
            if part.stat().st_size == have:
                raise HubUnavailable(f"The Hub serves only {have} bytes of {file.path}.")


def _note(done: int, file: RemoteFile, on_bytes: OnBytes) -> None:
    if done > file.bytes:
        raise HubUnavailable(f"The Hub serves more bytes of {file.path} than it announced.")
    on_bytes(done)


def _to_resolved(model: str, info: ModelInfo) -> ResolvedModel:
    if info.sha is None or info.siblings is None:
        raise HubUnavailable("The Hub named no revision or no files.")
    card = info.card_data
    return ResolvedModel(
        model=model,
        sha=info.sha,
        files=tuple(
            RemoteFile(
                path=each.rfilename,
                bytes=each.size or 0,
                sha256=each.lfs.sha256 if each.lfs is not None else None,
                git_sha1=each.blob_id if each.lfs is None else None,
            )
            for each in info.siblings
        ),
        gated=bool(info.gated),
        private=bool(info.private),
        license=_text(getattr(card, "license", None)),
        license_name=_text(getattr(card, "license_name", None)),
        license_link=_text(getattr(card, "license_link", None)),
        tags=tuple(info.tags or ()),
        pipeline_tag=info.pipeline_tag,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
