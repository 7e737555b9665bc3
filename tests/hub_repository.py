"""What a fake Hub holds: repositories with commits, branches, tags, and blobs of any size."""

import hashlib
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".parquet", ".gz")
LFS_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """Content of a file: bytes that are kept, then zeros up to its size."""

    head: bytes
    size: int
    digest: str | None = None

    @classmethod
    def of(cls, content):
        return content if isinstance(content, Blob) else cls(head=content, size=len(content))

    def read(self, start, end):
        kept = self.head[start:end]
        return kept + bytes(end - start - len(kept))

    @property
    def sha256(self):
        # nobody hashes a terabyte of zeros for a test
        return self.digest or hashlib.sha256(self.read(0, self.size)).hexdigest()

    @property
    def git_sha1(self):
        content = b"blob %d\0" % self.size + self.read(0, self.size)
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()

    def is_lfs(self, path):
        return path.endswith(LFS_SUFFIXES) or self.size > LFS_BYTES


@dataclass
class Repository:
    """One model repository."""

    repo_id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    card: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    """From a commit to its files."""
    served: dict = field(default_factory=dict)
    """From a commit to the files that are served instead."""
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    @property
    def head(self):
        return self.branches["main"]

    def commit(self, files):
        """Add a commit with exactly these files on top of main; return its id."""
        blobs = {path: Blob.of(content) for path, content in files.items()}
        digest = hashlib.sha1(f"{self.repo_id}{len(self.commits)}".encode(), usedforsecurity=False)
        for path, blob in sorted(blobs.items()):
            digest.update(path.encode() + blob.head)
        oid = digest.hexdigest()
        self.commits[oid] = blobs
        self.branches["main"] = oid
        return oid

    def find_commit(self, revision):
        """The commit of a branch, a tag or a commit's id; None if there is none."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def describe(self, oid):
        """The answer of the model endpoint."""
        siblings = [
            self._describe_file(path, blob) for path, blob in sorted(self.commits[oid].items())
        ]
        return {
            "id": self.repo_id,
            "sha": oid,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": self.disabled,
            "tags": ["text-generation"],
            "pipeline_tag": "text-generation",
            "cardData": self.card,
            "siblings": siblings,
        }

    def _describe_file(self, path, blob):
        described = {"rfilename": path, "size": blob.size, "blobId": "0" * 40}
        if blob.is_lfs(path):
            lfs = {"size": blob.size, "sha256": blob.sha256, "pointerSize": 130}
            return described | {"lfs": lfs}
        return described | {"blobId": blob.git_sha1}

    def list_tree(self, oid):
        """The answer of the tree endpoint."""
        listed = []
        for path, blob in sorted(self.commits[oid].items()):
            entry = {"type": "file", "path": path, "size": blob.size, "oid": "0" * 40}
            if not blob.is_lfs(path):
                entry["oid"] = blob.git_sha1
            else:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            listed.append(entry)
        return listed

    @property
    def blobs(self):
        """What is served of the head, which a test may change behind the listing's back."""
        head = self.head
        return self.served.setdefault(head, dict(self.commits[head]))

    def find_blob(self, oid, path):
        return self.served.get(oid, self.commits.get(oid, {})).get(path)

    def serve_instead(self, path, content):
        """Serve other bytes than those that are listed."""
        self.blobs[path] = Blob.of(content)

    def corrupt(self, path):
        """Flip a bit of what is served, as a broken disk would."""
        blob = self.blobs[path]
        spoiled = bytearray(blob.read(0, blob.size))
        spoiled[-1] ^= 1
        self.serve_instead(path, bytes(spoiled))
