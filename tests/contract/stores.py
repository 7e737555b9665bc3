"""An object store that keeps everything in memory and records what was asked of it."""

from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp

from api.errors import FileNotInArtifact
from api.storage.local import check_key


class RecordingStore:
    def __init__(self):
        self.objects = {}
        self.calls = []

    def put_file(self, key, path):
        self.calls.append(("put_file", check_key(key)))
        self.objects[key] = path.read_bytes()

    def path_of(self, key):
        path = Path(mkdtemp()) / "object"
        path.write_bytes(self._content(key))
        return path

    def open(self, key):
        return BytesIO(self._content(key))

    def exists(self, key):
        return check_key(key) in self.objects

    def delete(self, prefix):
        self.calls.append(("delete", check_key(prefix)))
        doomed = [key for key in self.objects if f"{key}/".startswith(f"{prefix}/")]
        for key in doomed:
            del self.objects[key]

    def _content(self, key):
        if check_key(key) not in self.objects:
            raise FileNotInArtifact(param="path")
        return self.objects[key]
