"""What handlers ask for by type: the ports of the app, and the principal with its scope."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from api.auth import Principal, authenticate
from api.db.connection import Database
from api.db.repositories.pages import MAX_PAGE, Cursor
from api.errors import ScopeMissing
from api.hub.base import ModelHub
from api.schemas.keys import Scope
from api.services.completions import Hosting
from api.services.events import EventFeed
from api.services.inference import InferenceClient
from api.services.limits import KeyLimits
from api.services.quantizations import QuantizationDesk
from api.settings import Settings
from api.storage.base import ObjectStore
from api.telemetry import Metrics

__all__ = [
    "ArtifactReader",
    "CursorDep",
    "DatabaseDep",
    "DeployWriter",
    "DeskDep",
    "HostingDep",
    "InferInvoker",
    "InferenceDep",
    "KeysAdmin",
    "Ports",
    "PortsDep",
    "QuantReader",
    "QuantWriter",
    "StoreDep",
]

bearer = HTTPBearer(auto_error=False, scheme_name="api_key", description="`abq_live_...`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything outside of the app that its handlers reach."""

    settings: Settings
    database: Database
    store: ObjectStore
    hub: ModelHub
    inference: InferenceClient
    limits: KeyLimits
    feed: EventFeed
    metrics: Metrics


def get_ports(request: Request) -> Ports:
    """The ports that the app was created with."""
    ports: Ports = request.app.state.ports
    return ports


PortsDep = Annotated[Ports, Depends(get_ports)]


def get_principal(
    scopes: SecurityScopes,
    ports: PortsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Principal:
    """Find out whom the request speaks for, and refuse it without the scope."""
    principal = authenticate(ports.database, credentials.credentials if credentials else None)
    for scope in scopes.scopes:
        if not principal.may(scope):
            raise ScopeMissing(f"This needs an API key with the scope {scope}.", scope=scope)
    return principal


def get_database(ports: PortsDep) -> Database:
    """The database."""
    return ports.database


def get_store(ports: PortsDep) -> ObjectStore:
    """The artifact store."""
    return ports.store


def get_inference(ports: PortsDep) -> InferenceClient:
    """The inference service."""
    return ports.inference


def get_hosting(ports: PortsDep) -> Hosting:
    """What generations need."""
    return Hosting(database=ports.database, inference=ports.inference, limits=ports.limits)


def get_desk(ports: PortsDep) -> QuantizationDesk:
    """Where quantization requests are judged and queued."""
    return QuantizationDesk(database=ports.database, hub=ports.hub, settings=ports.settings)


def get_cursor(
    after: Annotated[str | None, Query(max_length=40)] = None,
    before: Annotated[str | None, Query(max_length=40)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Cursor:
    """Where the asked-for page of a list starts."""
    return Cursor(after=after, before=before, limit=limit)


DatabaseDep = Annotated[Database, Depends(get_database)]
StoreDep = Annotated[ObjectStore, Depends(get_store)]
InferenceDep = Annotated[InferenceClient, Depends(get_inference)]
HostingDep = Annotated[Hosting, Depends(get_hosting)]
DeskDep = Annotated[QuantizationDesk, Depends(get_desk)]
CursorDep = Annotated[Cursor, Depends(get_cursor)]

QuantReader = Annotated[Principal, Security(get_principal, scopes=[Scope.QUANT_READ])]
QuantWriter = Annotated[Principal, Security(get_principal, scopes=[Scope.QUANT_WRITE])]
ArtifactReader = Annotated[Principal, Security(get_principal, scopes=[Scope.ARTIFACTS_READ])]
DeployWriter = Annotated[Principal, Security(get_principal, scopes=[Scope.DEPLOY_WRITE])]
InferInvoker = Annotated[Principal, Security(get_principal, scopes=[Scope.INFER_INVOKE])]
KeysAdmin = Annotated[Principal, Security(get_principal, scopes=[Scope.KEYS_ADMIN])]
