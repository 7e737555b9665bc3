"""The model card of a quantized model: YAML for the Hub, then what a person needs to know."""

import json
from collections.abc import Mapping
from typing import Any

from api.hub.base import ResolvedModel
from api.hub.names import LOCAL_PREFIX
from engine.checkpoint.evaluation import (
    Evaluation,
    Perplexities,
    TaskScore,
    TextMeasurement,
)
from engine.spec import FULL_BITS, PER_CHANNEL, QuantSpec

__all__ = ["write_card"]

DEFAULT_TASK = "text-generation"


def write_card(
    *, resolved: ResolvedModel, manifest: Mapping[str, Any], repo_id: str, tag: str
) -> str:
    """Write the card.

    Args:
        resolved: the source, with the licence that is carried over.
        manifest: the parsed `abq_manifest.json` of the result.
        repo_id: where the result goes.
        tag: the git tag that names exactly this result.
    """
    front = "\n".join(
        # every JSON value is YAML, and escaping is not ours to invent
        f"{key}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in _front_matter(resolved, manifest, repo_id).items()
        if value is not None
    )
    sections = (
        f"# {repo_id}",
        _introduction(resolved, manifest),
        _table(manifest),
        _usage(repo_id, tag),
        _provenance(resolved, manifest, tag),
    )
    return f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(
    resolved: ResolvedModel, manifest: Mapping[str, Any], repo_id: str
) -> dict[str, Any]:
    is_on_hub = not resolved.model.startswith(LOCAL_PREFIX)
    return {
        "base_model": resolved.model if is_on_hub else None,
        "base_model_relation": "quantized" if is_on_hub else None,
        "library_name": "abq",
        "license": resolved.license,
        "license_name": resolved.license_name,
        "license_link": resolved.license_link,
        "pipeline_tag": resolved.pipeline_tag or DEFAULT_TASK,
        "tags": ["abq", "quantized", f"abq-{_spec(manifest).notation}"],
        "model-index": _model_index(manifest, repo_id),
    }


def _model_index(manifest: Mapping[str, Any], repo_id: str) -> list[dict[str, Any]] | None:
    evaluation = Evaluation.from_json(manifest["evaluation"])
    results = [
        _result(each.dataset, _perplexity_metrics(each.perplexity))
        for each in evaluation.texts
        if each.perplexity is not None
    ]
    for task in evaluation.tasks:
        results += [_result(each.task, _task_metrics(each)) for each in task.scores]
    return [{"name": repo_id.partition("/")[2], "results": results}] if results else None


def _result(dataset: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    named = {"type": dataset, "name": dataset}
    return {"task": {"type": DEFAULT_TASK}, "dataset": named, "metrics": metrics}


def _perplexity_metrics(perplexity: Perplexities) -> list[dict[str, Any]]:
    return [
        {"type": "perplexity", "name": "Perplexity", "value": perplexity.quant},
        {"type": "perplexity", "name": "Perplexity of the source", "value": perplexity.fp},
    ]


def _task_metrics(score: TaskScore) -> list[dict[str, Any]]:
    return [
        {"type": score.metric, "name": score.metric, "value": score.quant},
        {"type": score.metric, "name": f"{score.metric} of the source", "value": score.fp},
    ]


def _introduction(resolved: ResolvedModel, manifest: Mapping[str, Any]) -> str:
    name = resolved.model
    source = f"`{name}`" if name.startswith(LOCAL_PREFIX) else f"[{name}](https://hf.co/{name})"
    bits = manifest["bits"]["per_weight"]
    return (
        f"{source}, quantized to `{_spec(manifest).notation}` by ABQ Service:"
        f" {bits:.3f} bits per quantized weight, counted from the stored tensors, scales and"
        " zero-points included."
    )


def _table(manifest: Mapping[str, Any]) -> str:
    spec, bits = _spec(manifest), manifest["bits"]
    size = bits["packed_bytes"] + bits["other_bytes"] + bits["embedding_bytes"]
    group = "per channel" if spec.group_size == PER_CHANNEL else str(spec.group_size)
    rows = [
        ("Weights", f"{spec.w_bits} bits" + (", bit-balanced" if spec.bit_balance else "")),
        ("Activations", _bits_or_full(spec.a_bits)),
        ("KV cache", _bits_or_full(spec.kv_bits)),
        ("Group size", group),
        ("Bits per quantized weight", f"{bits['per_weight']:.4f}"),
        ("Size", f"{size / 1e6:.1f} MB, {bits['fp_bytes'] / 1e6:.1f} MB in 16 bits"),
        *_measured_rows(Evaluation.from_json(manifest["evaluation"])),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _measured_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    if evaluation.perplexity is None:
        rows = [("Perplexity", f"not measured ({evaluation.status})")]
    else:
        rows = [row for each in evaluation.texts for row in _text_rows(each)]
    for task in evaluation.tasks:
        rows += [
            (
                f"{each.task}, {each.metric}, {each.examples} examples",
                f"{each.quant:.4f} (source {each.fp:.4f})",
            )
            for each in task.scores
        ]
    return rows


def _text_rows(text: TextMeasurement) -> list[tuple[str, str]]:
    if text.perplexity is None:
        return []
    basis = f"{text.perplexity.tokens} tokens of {text.dataset}"
    rows = [
        (f"Perplexity of the source, {basis}", f"{text.perplexity.fp:.3f}"),
        ("Perplexity of this model, same tokens", f"{text.perplexity.quant:.3f}"),
    ]
    if text.divergence is not None:
        found = text.divergence
        rows += [
            ("KL divergence from the source, mean a token", f"{found.mean:.4f} nats"),
            ("Same most likely token as the source", f"{found.top1_agreement:.1%}"),
        ]
    return rows


def _usage(repo_id: str, tag: str) -> str:
    folder = repo_id.partition("/")[2]
    return f"""## Use

```bash
hf download {repo_id} --revision {tag} --local-dir {folder}
```

With ABQ Service installed:

```python
from pathlib import Path

from engine.inference.engine import open_engine
from engine.inference.request import GenerationRequest

engine = open_engine(Path("{folder}"))
prompt = engine.text.encode("The capital of France is")
for chunk in engine.generate(GenerationRequest(prompt_ids=prompt, max_tokens=32)):
    print(chunk.text, end="", flush=True)
```

`abq_manifest.json` lists every file with its sha256."""


def _provenance(resolved: ResolvedModel, manifest: Mapping[str, Any], tag: str) -> str:
    return (
        "## Origin\n\n"
        f"- source revision: `{resolved.sha}`\n"
        f"- recipe: `{_spec(manifest).recipe}`, random seed {manifest['seed']}\n"
        f"- engine version: {manifest['engine_version']}\n"
        f"- job: `{tag}`"
    )


def _spec(manifest: Mapping[str, Any]) -> QuantSpec:
    return QuantSpec.from_json(manifest["spec"])


def _bits_or_full(bits: int) -> str:
    return "not quantized" if bits == FULL_BITS else f"{bits} bits"
