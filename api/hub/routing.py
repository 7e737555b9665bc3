"""One hub for all names: `local:...` goes to the operator's folders, the rest to the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from api.hub.base import (
    ModelFacts,
    ModelHub,
    ModelSource,
    OnProgress,
    PublishedModel,
    PublishTarget,
    ResolvedModel,
    TextSource,
)
from api.hub.local import LocalHub
from api.hub.names import LOCAL_PREFIX
from api.settings import Settings, configure_hub_client

if TYPE_CHECKING:
    from api.hub.connection import HubConnection

__all__ = ["RoutedHub", "create_hub", "create_texts"]

REQUEST_PATIENCE_S = 1.5
"""How long a caller of the API waits for a busy Hub, on top of what the Hub takes."""


class RoutedHub(ModelHub):
    """Chooses the source by the model's name; publishes to the Hub only."""

    def __init__(self, *, remote: ModelHub, local: ModelSource) -> None:
        self._remote = remote
        self._local = local

    @override
    def resolve(self, model: str, revision: str | None) -> ResolvedModel:
        return self._source_of(model).resolve(model, revision)

    @override
    def inspect(self, resolved: ResolvedModel) -> ModelFacts:
        return self._source_of(resolved.model).inspect(resolved)

    @override
    def download(self, resolved: ResolvedModel, folder: Path, on_progress: OnProgress) -> None:
        self._source_of(resolved.model).download(resolved, folder, on_progress)

    @override
    def check_target(self, target: PublishTarget) -> None:
        self._remote.check_target(target)

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
        return self._remote.publish(folder, target, card=card, tag=tag, check=check)

    def _source_of(self, model: str) -> ModelSource:
        return self._local if model.startswith(LOCAL_PREFIX) else self._remote


def create_hub(settings: Settings, *, patience_s: float = REQUEST_PATIENCE_S) -> ModelHub:
    """Make the hub of this process; a worker passes more patience than a request has."""
    connection = _connect(settings, patience_s)
    from api.hub.huggingface import HuggingFaceHub  # noqa: PLC0415  # as below

    return RoutedHub(remote=HuggingFaceHub(connection), local=LocalHub(settings.hub.model_roots))


def create_texts(settings: Settings, *, patience_s: float = REQUEST_PATIENCE_S) -> TextSource:
    """Make the source of texts of this process."""
    connection = _connect(settings, patience_s)
    from api.hub.datasets import HubTexts  # noqa: PLC0415  # as below

    return HubTexts(connection)


def _connect(settings: Settings, patience_s: float) -> "HubConnection":
    configure_hub_client()
    # the client reads its environment when it is imported, so this must come after
    from api.hub.connection import HubConnection  # noqa: PLC0415

    hub = settings.hub
    return HubConnection(
        endpoint=hub.endpoint,
        token=hub.token.get_secret_value() if hub.token is not None else None,
        timeout_s=hub.timeout_s,
        patience_s=patience_s,
    )
