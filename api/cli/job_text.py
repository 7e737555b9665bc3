"""A job in words: its facts, its row in a list, its layers."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from api.cli.output import status_text
from api.cli.quantities import (
    age_text,
    bits_text,
    bytes_text,
    change_text,
    divergence_text,
    duration_text,
    loss_text,
)

__all__ = ["estimate_facts", "job_facts", "job_row", "layer_row"]


def job_facts(job: Mapping[str, Any]) -> dict[str, str | Text]:
    """What a person wants to know of a job, in the order of its life."""
    report, estimate = job.get("report") or {}, job.get("estimate") or {}
    error = job.get("error") or {}
    where = f" at {error['layer']}" if error.get("layer") else ""
    return {
        "status": status_text(job["status"]),
        "stage": str(job.get("stage") or "") if job["status"] == "running" else "",
        "progress": _progress_text(job),
        "error": Text(f"{error['code']}{where}: {error['message']}", "red") if error else "",
        "model": f"{job['model']} at {str(job.get('source_sha') or '')[:12]}",
        "bits": str(job["notation"]),
        "labels": ", ".join(f"{name}={value}" for name, value in (job["labels"] or {}).items()),
        "attempt": f"{job['attempt']} of {job['max_attempts']}",
        "promised": _promise_text(estimate) if not report else "",
        "searched": _search_text(report.get("search")),
        "measured": _measure_text(report, estimate) if report else "",
        "perplexity": _perplexity_text(report),
        "predictions": _predictions_text(report),
        "not measured": _failures_text(report),
        "tasks": _tasks_text(report),
        "took": duration_text(report["seconds"]) if report.get("seconds") else "",
        "artifact": str(job.get("artifact_id") or ""),
        "push": _push_text(report),
        "created": age_text(job["created_at"]),
    }


def estimate_facts(estimate: Mapping[str, Any]) -> dict[str, str | Text]:
    """What preflight found out, without starting anything."""
    facts = estimate.get("estimate") or estimate
    free = bytes_text(facts["disk_free_bytes"])
    return {
        "model": f"{estimate['model']} at {str(estimate['source_sha'])[:12]}",
        "bits": str(estimate["notation"]),
        "parameters": f"{facts['parameters'] / 1e6:.1f} M in {facts['layers']} layers",
        "size": f"{bytes_text(facts['source_bytes'])} -> {bytes_text(facts['artifact_bytes'])}",
        "bits per weight": f"{facts['promised_bits_per_weight']:.3f}",
        "disk": f"{bytes_text(facts['disk_needed_bytes'])} needed, {free} free",
        "memory": bytes_text(facts["memory_needed_bytes"]),
        "time": f"about {duration_text(facts['seconds'])}",
    }


def job_row(job: Mapping[str, Any]) -> tuple[str | Text, ...]:
    """One line of `abq jobs list`."""
    status = status_text(job["status"])
    if job["status"] == "running" and job.get("stage"):
        status.append(f", {job['stage']}{_share_text(job.get('progress'))}", style="dim")
    perplexity = (job.get("report") or {}).get("perplexity")
    return (
        job["id"],
        job["model"],
        job["notation"],
        status,
        f"{perplexity['fp']:.2f} -> {perplexity['quant']:.2f}" if perplexity else "",
        age_text(job["created_at"]),
    )


def layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of `abq jobs show --layers`."""
    return (
        str(layer["index"] + 1),
        layer["name"],
        loss_text(layer["loss_before"]),
        loss_text(layer["loss_after"]),
        change_text(layer["loss_before"], layer["loss_after"]),
        "from checkpoint" if layer.get("resumed") else duration_text(layer["seconds"]),
    )


def _promise_text(estimate: Mapping[str, Any]) -> str:
    if not estimate:
        return ""
    bits = estimate["promised_bits_per_weight"]
    return f"{bits:.3f} bits per weight, {bytes_text(estimate['artifact_bytes'])}"


def _measure_text(report: Mapping[str, Any], estimate: Mapping[str, Any]) -> str:
    promised = report.get("promised_bits_per_weight", estimate.get("promised_bits_per_weight"))
    sizes = f"{bytes_text(report['bytes_fp'])} -> {bytes_text(report['bytes_quant'])}"
    bits = f"{report['bits_per_weight']:.3f} bits per weight"
    return f"{bits} (promised {promised:.3f}), {sizes}"


def _search_text(search: Mapping[str, Any] | None) -> str:
    if not search:
        return ""
    return bits_text(search["predicted_average_bits"], search["predicted_loss"], search["bits"])


def _push_text(report: Mapping[str, Any]) -> str | Text:
    refusal = report.get("publish_error")
    return Text(f"{refusal['code']}: {refusal['message']}", "red") if refusal else ""


def _perplexity_text(report: Mapping[str, Any]) -> str:
    perplexity = report.get("perplexity")
    if not perplexity:
        return ""
    texts = _evaluation(report).get("texts") or [{"perplexity": perplexity, "dataset": ""}]
    measured = [each for each in texts if each["perplexity"]]
    # one text needs no name
    return "; ".join(
        _change_of(each["perplexity"]) + (f" on {each['dataset']}" if len(texts) > 1 else "")
        for each in measured
    )


def _change_of(perplexity: Mapping[str, Any]) -> str:
    change = change_text(perplexity["fp"], perplexity["quant"])
    return f"{perplexity['fp']:.2f} -> {perplexity['quant']:.2f} ({change})"


def _predictions_text(report: Mapping[str, Any]) -> str:
    texts = _evaluation(report).get("texts") or []
    found = next((each["divergence"] for each in texts if each["divergence"]), None)
    return divergence_text(found) if found else ""


def _tasks_text(report: Mapping[str, Any]) -> str:
    scores = [score for task in _evaluation(report).get("tasks") or [] for score in task["scores"]]
    return "; ".join(
        f"{each['task']} {each['metric']} {100 * each['fp']:.1f} -> {100 * each['quant']:.1f} %"
        for each in scores
    )


def _failures_text(report: Mapping[str, Any]) -> str:
    evaluation = _evaluation(report)
    parts = [
        *((each["dataset"], each) for each in evaluation.get("texts") or []),
        *((each["family"], each) for each in evaluation.get("tasks") or []),
    ]
    return "; ".join(f"{name}: {part['message']}" for name, part in parts if part["message"])


def _evaluation(report: Mapping[str, Any]) -> Mapping[str, Any]:
    # reports of an earlier version have none
    return report.get("evaluation") or {}


def _share_text(progress: Mapping[str, Any] | None) -> str:
    if not progress or not progress.get("total"):
        return ""
    return f" {100 * progress['done'] / progress['total']:.0f} %"


def _progress_text(job: Mapping[str, Any]) -> str:
    progress = job.get("progress")
    if not progress or job["status"] != "running":
        return ""
    if progress.get("unit") == "bytes":
        return f"{bytes_text(progress['done'])} of {bytes_text(progress['total'])}"
    return f"{progress['done']} of {progress['total']} {progress.get('unit') or ''}".rstrip()
