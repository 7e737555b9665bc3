"""Artifacts in the object store as the inference process opens them: by id, verified, warmed up."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from api.errors import ModelNotHosted
from engine.checkpoint.manifest import read_manifest, verify_directory
from engine.inference.engine import EngineOptions, InferenceEngine, kv_bytes_at_most, open_engine
from engine.inference.request import GenerationRequest
from worker.inference.entry import ModelLabels
from worker.inference.progress import LoadProgress, LoadStage, ProgressSink

__all__ = ["ArtifactFolder"]

ARTIFACT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
VERIFIED_AT, READ_AT = 0.4, 0.8
"""Parts of the whole way, roughly: hashing and reading take about the same time."""
FLOAT_GROWTH = 2
"""A 16-bit tensor becomes 32-bit on a CPU; on a GPU this is an overestimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFolder:
    """The store's root, one folder an artifact, and where and how models are served."""

    root: Path
    device: str | None
    options: EngineOptions = field(default_factory=EngineOptions)

    def check(self, artifact_id: str) -> None:
        """Refuse an id that names no complete artifact.

        Raises:
            ModelNotHosted: there is none.
        """
        self._directory(artifact_id)

    def memory_needed(self, artifact_id: str) -> int:
        """Bytes that loading will take at most, told from the manifest alone.

        Raises:
            ModelNotHosted: there is no such artifact.
            CheckpointInvalid: it is damaged.
        """
        directory = self._directory(artifact_id)
        bits = read_manifest(directory).bits
        weights = bits.packed_bytes + FLOAT_GROWTH * (bits.other_bytes + bits.embedding_bytes)
        return weights + kv_bytes_at_most(directory, self.options, self.device)

    def describe(self, artifact_id: str) -> ModelLabels:
        """Call the model after its source and its bits, as a deployment is called by default.

        Raises:
            ModelNotHosted: there is no such artifact.
            CheckpointInvalid: it is damaged.
        """
        manifest = read_manifest(self._directory(artifact_id))
        source = manifest.source.get("repo", "").rstrip("/").rsplit("/", 1)[-1]
        notation = manifest.spec.notation.replace("*", "b")
        return ModelLabels(
            artifact_id=artifact_id,
            model_name=f"{source}-{notation}" if source else notation,
            w_bits=str(manifest.spec.w_bits),
            a_bits=str(manifest.spec.a_bits),
        )

    def open(self, artifact_id: str, on_progress: ProgressSink) -> InferenceEngine:
        """Check every byte against the manifest, load, and decode one token.

        Raises:
            ModelNotHosted: there is no such artifact.
            CheckpointInvalid: it is damaged.
        """
        directory = self._directory(artifact_id)
        verify_directory(
            directory,
            lambda part: on_progress(
                LoadProgress(stage=LoadStage.VERIFYING, fraction=VERIFIED_AT * part)
            ),
        )
        on_progress(LoadProgress(stage=LoadStage.READING, fraction=VERIFIED_AT))
        engine = open_engine(directory, self.device, self.options)
        on_progress(LoadProgress(stage=LoadStage.WARMING_UP, fraction=READ_AT))
        # what is slow once, or fails at all, does so before the model counts as ready
        first = GenerationRequest(prompt_ids=engine.text.encode("a"), max_tokens=1)
        try:
            for _ in engine.generate(first):
                pass
        except BaseException:
            # its thread would keep the model for ever
            engine.close()
            raise
        return engine

    def _directory(self, artifact_id: str) -> Path:
        directory = self.root / artifact_id
        if not ARTIFACT_ID.fullmatch(artifact_id) or not directory.is_dir():
            raise ModelNotHosted
        return directory
