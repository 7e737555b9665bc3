"""A finished checkpoint directory as the service sees it: files and a manifest that lists them."""

import hashlib
import json
import os

SPEC = {"w_bits": 3, "a_bits": 8, "kv_bits": 16, "group_size": 64}


def save_artifact(folder, *, shards=1, perplexity=True, **files):
    """Write a checkpoint directory; keywords add files."""
    folder.mkdir(parents=True)
    contents = {
        f"model-{index + 1:05d}-of-{shards:05d}.safetensors": os.urandom(50_000)
        for index in range(shards)
    }
    contents |= {"config.json": b"{}", "LICENSE": b"Apache License 2.0"} | files
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    measured = {"fp": 20.82, "quant": 21.5, "tokens": 4096, "dataset": "builtin"}
    manifest = {
        "format": "abq-manifest-v1",
        "engine_version": "0.1.0",
        "source": {"repo": "acme/tiny", "revision": "a" * 40},
        "spec": SPEC,
        "seed": 0,
        "bits": {
            "per_weight": 3.375,
            "promised_per_weight": 3.375,
            "quantized_weights": 1000,
            "packed_bytes": 50_000,
            "other_bytes": 1000,
            "embedding_bytes": 2000,
            "fp_bytes": 200_000,
        },
        "layers": [],
        "evaluation": {
            "status": "succeeded" if perplexity else "failed",
            "perplexity": measured if perplexity else None,
        },
        "files": [
            {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(contents.items())
        ],
    }
    (folder / "abq_manifest.json").write_text(json.dumps(manifest))
    return folder
