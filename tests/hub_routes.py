"""The endpoints of the fake Hub that huggingface_hub 1.33 and 2.4 call."""

import asyncio
import base64
import json
import re
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.hub_faults import Trouble
from tests.hub_repository import Blob

CHUNK_BYTES = 16 << 10
WRITER = "hf_" + "w" * 34
"""The token of user `acme`, who has access to gated models."""
STRANGER = "hf_" + "s" * 34
"""The token of user `nobody`, who has access to nothing."""

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(request: Request):
    user = _user(request)
    if user is None:
        return _error(401, None, "Invalid credentials in Authorization header")
    return {"type": "user", "name": user, "orgs": [{"name": f"{user}-team"}]}


@router.get("/api/models/{owner}/{name}")
@router.get("/api/models/{owner}/{name}/revision/{revision:path}")
def describe(request: Request, owner: str, name: str, revision: str = "main"):
    hub = request.app.state.hub
    repository = _visible(hub, request, f"{owner}/{name}")
    if isinstance(repository, Response):
        return repository
    oid = repository.find_commit(revision)
    return repository.describe(oid) if oid else _error(404, "RevisionNotFound")


@router.get("/api/models/{owner}/{name}/auth-check")
def auth_check(request: Request, owner: str, name: str):
    hub = request.app.state.hub
    repository = _visible(hub, request, f"{owner}/{name}")
    return repository if isinstance(repository, Response) else _gate(repository, request) or {}


@router.get("/api/models/{owner}/{name}/refs")
def refs(request: Request, owner: str, name: str):
    hub = request.app.state.hub
    repository = hub.repositories[f"{owner}/{name}"]
    listed = [
        [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": oid}
         for key, oid in held.items()]
        for kind, held in (("heads", repository.branches), ("tags", repository.tags))
    ]  # fmt: skip
    return {"branches": listed[0], "tags": listed[1], "converts": []}


@router.get("/api/models/{owner}/{name}/tree/{revision}")
def tree(request: Request, owner: str, name: str, revision: str):
    repository = _visible(request.app.state.hub, request, f"{owner}/{name}")
    if isinstance(repository, Response):
        return repository
    oid = repository.find_commit(revision)
    return repository.list_tree(oid) if oid else _error(404, "RevisionNotFound")


@router.get("/api/datasets/{owner}/{name}/revision/{revision:path}")
def describe_dataset(request: Request, owner: str, name: str, revision: str):
    return describe(request, "datasets", f"{owner}/{name}", revision)


@router.post("/api/datasets/{owner}/{name}/paths-info/{revision}")
async def paths_info(request: Request, owner: str, name: str, revision: str):
    hub = request.app.state.hub
    repository = _visible(hub, request, f"datasets/{owner}/{name}")
    if isinstance(repository, Response):
        return repository
    oid = repository.find_commit(revision)
    wanted = parse_qs((await request.body()).decode())["paths"]
    listed = repository.list_tree(oid) if oid else None
    if listed is None:
        return _error(404, "RevisionNotFound")
    return [each for each in listed if each["path"] in wanted]


@router.get("/datasets/{owner}/{name}/resolve/{revision}/{path:path}")
def resolve_dataset(request: Request, owner: str, name: str, revision: str, path: str):
    return resolve(request, "datasets", f"{owner}/{name}", revision, path)


@router.get("/{owner}/{name}/resolve/{revision}/{path:path}")
@router.head("/{owner}/{name}/resolve/{revision}/{path:path}")
def resolve(request: Request, owner: str, name: str, revision: str, path: str):
    hub = request.app.state.hub
    repository = _visible(hub, request, f"{owner}/{name}")
    if isinstance(repository, Response):
        return repository
    blocked = _gate(repository, request)
    if blocked is not None:
        return blocked
    oid = repository.find_commit(revision)
    blob = repository.find_blob(oid, path)
    return _send(hub, request, blob, oid, path) if blob else _error(404, "EntryNotFound")


@router.post("/api/repos/create")
async def create(request: Request):
    hub = request.app.state.hub
    body = await request.json()
    user = _user(request)
    owner = body.get("organization") or user
    if user is None or owner not in (user, f"{user}-team"):
        return _error(403, None, "no rights")
    repo_id = f"{owner}/{body['name']}"
    if repo_id in hub.repositories:
        return JSONResponse({"error": "exists", "url": f"{hub.url}/{repo_id}"}, 409)
    is_private = body.get("private") is True or body.get("visibility") == "private"
    hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs"}, private=is_private)
    return {"url": f"{hub.url}/{repo_id}", "id": repo_id}


@router.post("/api/validate-yaml")
async def validate(request: Request):
    content = (await request.json())["content"]
    errors = [] if content.startswith("---\n") else [{"message": "no front matter"}]
    return {"errors": errors, "warnings": []}


@router.post("/api/models/{owner}/{name}/preupload/{revision}")
async def preupload(request: Request, owner: str, name: str, revision: str):
    hub = request.app.state.hub
    repository = hub.repositories[f"{owner}/{name}"]
    held = repository.commits[repository.find_commit(revision)]
    answers = []
    for file in (await request.json())["files"]:
        old = held.get(file["path"])
        is_lfs = Blob(head=b"", size=file["size"]).is_lfs(file["path"])
        oid = old and (old.sha256 if is_lfs else old.git_sha1)
        mode = "lfs" if is_lfs else "regular"
        answers.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
        )
    return {"files": answers}


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
async def batch(request: Request, owner: str, name: str):
    hub = request.app.state.hub
    answers = []
    for each in (await request.json())["objects"]:
        answer = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] not in hub.uploads:
            answer["actions"] = {"upload": {"href": f"{hub.url}/upload/{each['oid']}"}}
        answers.append(answer)
    return {"objects": answers, "transfer": "basic"}


@router.put("/upload/{oid}")
async def upload(request: Request, oid: str):
    hub = request.app.state.hub
    content = await request.body()
    if Blob.of(content).sha256 != oid:
        return _error(400, None, "the content has another hash")
    hub.uploads[oid] = content
    return {}


@router.post("/api/models/{owner}/{name}/commit/{revision}")
async def commit(request: Request, owner: str, name: str, revision: str):
    hub = request.app.state.hub
    repository = hub.repositories[f"{owner}/{name}"]
    files = dict(repository.commits[repository.head])
    lines = [json.loads(line) for line in (await request.body()).splitlines()]
    parent = lines[0]["value"].get("parentCommit")
    if parent not in (None, repository.head):
        return _error(412, None, "the branch has moved on")
    for line in lines[1:]:
        _apply(hub, files, line["key"], line["value"])
    oid = repository.commit(files)
    url = f"{hub.url}/{owner}/{name}/commit/{oid}"
    return {"success": True, "commitOid": oid, "commitUrl": url}


@router.post("/api/models/{owner}/{name}/tag/{revision}")
async def tag(request: Request, owner: str, name: str, revision: str):
    hub = request.app.state.hub
    repository = hub.repositories[f"{owner}/{name}"]
    wanted = (await request.json())["tag"]
    if wanted in repository.tags:
        return _error(409, None, "tag exists")
    repository.tags[wanted] = repository.find_commit(revision)
    return {}


def _apply(hub, files, key, value):
    match key:
        case "file":
            files[value["path"]] = Blob.of(base64.b64decode(value["content"]))
        case "lfsFile":
            files[value["path"]] = Blob.of(hub.uploads[value["oid"]])
        case "deletedFile":
            del files[value["path"]]


def _user(request):
    token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
    return {WRITER: "acme", STRANGER: "nobody"}.get(token)


def _visible(hub, request, repo_id):
    repository = hub.repositories.get(repo_id)
    user = _user(request)
    if repository is None or (repository.private and user != "acme"):
        # the Hub does not tell strangers what is missing and what is private
        return _error(404 if user else 401, "RepoNotFound")
    return repository


def _gate(repository, request):
    if not repository.gated or _user(request) == "acme":
        return None
    return _error(403 if _user(request) else 401, "GatedRepo")


def _error(status, code, message="refused"):
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers=headers)


def _send(hub, request, blob, oid, path):
    whole = hub.take(request, {Trouble.NO_RANGE}) is not None
    wanted = None if whole else re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    start = int(wanted[1]) if wanted else 0
    end = min(blob.size, int(wanted[2]) + 1) if wanted and wanted[2] else blob.size
    if start >= blob.size > 0:
        return Response(status_code=416)
    etag = blob.sha256 if blob.is_lfs(path) else blob.git_sha1
    if hub.take(request, {Trouble.WRONG_ETAG}):
        etag = "f" * len(etag)
    headers = {
        "ETag": f'"{etag}"',
        "X-Repo-Commit": oid,
        "Content-Length": str(end - start),
        "Accept-Ranges": "bytes",
    }
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
    if request.method == "HEAD":
        return Response(headers=headers)
    body = _body(hub, request, blob, start, end)
    return StreamingResponse(
        body, 206 if wanted else 200, headers, media_type="application/octet-stream"
    )


async def _body(hub, request, blob, start, end):
    fault = hub.take(request, {Trouble.TRUNCATED, Trouble.SLOW, Trouble.STALLED})
    stop = end
    if fault is not None and fault.trouble is not Trouble.SLOW:
        stop = min(end, start + int(fault.amount))
    for offset in range(start, stop, CHUNK_BYTES):
        if fault is not None and fault.trouble is Trouble.SLOW:
            await asyncio.sleep(fault.amount)
        chunk = blob.read(offset, min(stop, offset + CHUNK_BYTES))
        request.state.seen.sent_bytes += len(chunk)
        yield chunk
    if fault is not None and fault.trouble is Trouble.STALLED:
        await asyncio.sleep(60)
