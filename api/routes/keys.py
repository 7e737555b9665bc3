"""`/v1/api_keys`: keys for other people and programs of the same tenant."""

from fastapi import APIRouter
from starlette.status import HTTP_201_CREATED

from api.deps import DatabaseDep, KeysAdmin
from api.schemas.base import Deleted, Page
from api.schemas.keys import ApiKeyOut, ApiKeyRequest, NewApiKey
from api.services import keys

__all__ = ["router"]

router = APIRouter(prefix="/v1/api_keys", tags=["api keys"])


@router.post("", status_code=HTTP_201_CREATED)
def create_api_key(body: ApiKeyRequest, database: DatabaseDep, principal: KeysAdmin) -> NewApiKey:
    """Make a key. Its text is in this answer and nowhere else."""
    issued = keys.create_key(database, principal, body)
    return NewApiKey.of_issued(issued.row, issued.text)


@router.get("")
def list_api_keys(database: DatabaseDep, principal: KeysAdmin) -> Page[ApiKeyOut]:
    """List keys, newest first, revoked ones included."""
    rows = keys.list_keys(database, principal.tenant_id)
    return Page[ApiKeyOut].of([ApiKeyOut.of(row) for row in rows])


@router.delete("/{key_id}")
def revoke_api_key(key_id: str, database: DatabaseDep, principal: KeysAdmin) -> Deleted:
    """Make a key useless from now on."""
    keys.revoke_key(database, principal.tenant_id, key_id)
    return Deleted(id=key_id, object="api_key")
