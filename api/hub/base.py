"""Where models come from and go to: values and the ports `ModelSource` and `ModelHub`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from engine.architecture import Architecture
from engine.datasets import TextName

__all__ = [
    "ModelFacts",
    "ModelHub",
    "ModelSource",
    "OnProgress",
    "PublishTarget",
    "PublishedModel",
    "RemoteFile",
    "ResolvedModel",
    "TensorHeader",
    "TextSource",
    "TextUse",
]

OnProgress = Callable[[int, int], None]
"""Takes bytes done and bytes in all; an exception from it stops the download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a model at its pinned revision."""

    path: str
    bytes: int
    sha256: str | None = None
    """Known for large files."""
    git_sha1: str | None = None
    """Known for small files: git's hash of the content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model, or a data set, at one immutable revision."""

    model: str
    """As requested: `owner/name` or `local:<root>/<folder>`."""
    sha: str
    """40 hexadecimal digits; every later read names it."""
    files: tuple[RemoteFile, ...]
    """All files of the repository, also those that are never fetched."""
    gated: bool = False
    private: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    repo_type: str | None = None
    """`dataset`, or None for a model."""

    def find_file(self, path: str) -> RemoteFile | None:
        """The file of that path, or None."""
        return next((each for each in self.files if each.path == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor as the header of its safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's config and tensor headers say; no weight was read for it."""

    config: Mapping[str, Any]
    architecture: Architecture
    """What the config says, within the limits of what can be quantized."""
    tensors: Mapping[str, TensorHeader]
    weight_files: tuple[RemoteFile, ...]
    """The shards that hold `tensors`: those of the index, or the one file."""
    fetched_files: tuple[RemoteFile, ...]
    """All that a download takes: the shards and the allow-listed small files."""

    @property
    def parameters(self) -> int:
        """Values in all tensors."""
        return sum(each.elements for each in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the shards."""
        return sum(each.bytes for each in self.weight_files)

    @property
    def source_bytes(self) -> int:
        """Size of all that a download takes."""
        return sum(each.bytes for each in self.fetched_files)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The safetensors names of the data types present, sorted."""
        return tuple(sorted({each.dtype for each in self.tensors.values()}))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishTarget:
    """Where a result is to be pushed, as request and job hold it."""

    repo_id: str
    private: bool = True

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read `repo_id` and `private`; a push is private unless asked otherwise."""
        return cls(repo_id=str(record["repo_id"]), private=record.get("private") is not False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """A model that was pushed."""

    repo_id: str
    revision: str
    """The commit that holds exactly the pushed files."""
    url: str

    def to_json(self) -> dict[str, str]:
        """Write the fields, as the artifact row holds them."""
        return {"repo_id": self.repo_id, "revision": self.revision, "url": self.url}


class TextUse(StrEnum):
    """What a text is for, and so which of its splits is taken."""

    CALIBRATION = "calibration"
    """The train split."""
    EVALUATION = "evaluation"
    """The test split, or the validation split where there is no other."""


class TextSource(Protocol):
    """Gives texts that have a name of their own."""

    def fetch(self, name: TextName, use: TextUse, path: Path, check: Callable[[], None]) -> None:
        """Write a text to `path`, as UTF-8, whole or not at all.

        An exception from `check`, which is asked while bytes come in, ends it.

        Raises:
            DatasetUnavailable: it is not there, not what it should be, or cannot be read here.
            HubUnavailable: the Hub did not answer, or served other bytes than it announced.
        """


class ModelSource(Protocol):
    """Gives models. All errors are `api.errors.ServiceError`s that name the request field."""

    def resolve(self, model: str, revision: str | None) -> ResolvedModel:
        """Pin a model to an immutable revision; None is the default branch.

        Raises:
            ModelNotFound: there is no such model, or it is not visible.
            RevisionNotFound: the model has no such revision.
            ModelGated: its terms were not accepted with the configured token.
            HubUnavailable: the Hub did not answer in time.
        """

    def inspect(self, resolved: ResolvedModel) -> ModelFacts:
        """Read config and tensor headers within fixed limits; fetches no weights.

        Raises:
            UnsupportedFormat: there are no safetensors weights, or they are malformed.
            ConfigRejected: config or tokenizer are missing or not acceptable.
            HubUnavailable: the Hub did not answer in time.
        """

    def download(self, resolved: ResolvedModel, folder: Path, on_progress: OnProgress) -> None:
        """Fetch what the facts list into `folder`; goes on from what an earlier call left there.

        Progress comes from the calling thread, at most twice a second and once at the end.

        Raises:
            HubUnavailable: the Hub did not answer, or served other bytes than it announced.
        """


class ModelHub(ModelSource, Protocol):
    """Gives models and takes them."""

    def check_target(self, target: PublishTarget) -> None:
        """Refuse early what `publish` would refuse late.

        Raises:
            InvalidRequest: the name is malformed, there is no token, the token may not write
                there, the repository is public though a private push is asked for, or it holds
                something that this service did not push.
        """

    def publish(
        self,
        folder: Path,
        target: PublishTarget,
        *,
        card: str,
        tag: str,
        check: Callable[[], None],
    ) -> PublishedModel:
        """Push all files of `folder` and the model card as one commit, and tag that commit.

        Running it again with the same tag changes nothing and gives the same answer. An exception
        from `check`, which is asked while bytes go out, ends it before anything is visible.

        Raises:
            InvalidRequest: as `check_target`.
            HubUnavailable: the Hub did not answer in time.
        """
