"""What callers may write as model, revision and target: names, never URLs or paths."""

import re

from api.errors import InvalidRequest

__all__ = ["LOCAL_PREFIX", "LocalName", "check_model_id", "check_repo_id", "check_revision"]

LOCAL_PREFIX = "local:"
MAX_REPO_ID = 96
REPO_ID = re.compile(
    r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII
)
REVISION = re.compile(r"[0-9a-f]{40}|\w[\w./-]{0,99}", re.ASCII)
ROOT_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)
FOLDER_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,127}", re.ASCII)
MAX_FOLDERS = 8


class LocalName:
    """`local:<root>/<folder>` taken apart; the root is an operator's, the folder the caller's."""

    __slots__ = ("parts", "root")

    def __init__(self, name: str, *, param: str) -> None:
        root, *parts = name.removeprefix(LOCAL_PREFIX).split("/")
        well_formed = ROOT_NAME.fullmatch(root) and 1 <= len(parts) <= MAX_FOLDERS
        if not well_formed or not all(FOLDER_NAME.fullmatch(part) for part in parts):
            raise InvalidRequest(
                f"{_shorten(name)} is no local name; write local:<root>/<name>", param=param
            )
        self.root = root
        self.parts = tuple(parts)


def check_model_id(model: str) -> None:
    """Refuse what is not `owner/name` in the Hub's alphabet.

    Raises:
        InvalidRequest: naming the field `model`.
    """
    if not _is_repo_id(model):
        raise InvalidRequest(
            f"{_shorten(model)} is no model id; write owner/name, for example Qwen/Qwen3-0.6B",
            param="model",
        )


def check_revision(revision: str) -> None:
    """Refuse what is neither a commit nor a plausible branch or tag.

    Raises:
        InvalidRequest: naming the field `revision`.
    """
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidRequest(
            f"{_shorten(revision)} is no revision; write a branch, a tag or 40 hexadecimal digits",
            param="revision",
        )


def check_repo_id(repo_id: str) -> None:
    """Refuse a target that is not `owner/name` in the Hub's alphabet.

    Raises:
        InvalidRequest: naming the field `publish.repo_id`.
    """
    if not _is_repo_id(repo_id):
        raise InvalidRequest(
            f"{_shorten(repo_id)} is no repository id; write owner/name, for example"
            " acme/Qwen3-0.6B-w4a8",
            param="publish.repo_id",
        )


def _is_repo_id(text: str) -> bool:
    # the Hub refuses double dashes and dots, and git an ending of its own
    has_reserved = "--" in text or ".." in text or text.endswith(".git")
    return len(text) <= MAX_REPO_ID and bool(REPO_ID.fullmatch(text)) and not has_reserved


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
