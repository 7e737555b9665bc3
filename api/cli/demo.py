"""`abq demo`: the whole way of a model through the service, on this machine, with real numbers."""

import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from api.cli.chat import Reply, stream_chat
from api.cli.client import ApiClient
from api.cli.connection import JsonFlag
from api.cli.demo_model import MODEL_NAME, prepare_model
from api.cli.demo_report import DemoReport, report_table, write_report
from api.cli.demo_service import log_tail, running_service
from api.cli.deploy import wait_until_ready
from api.cli.download import download_artifact
from api.cli.errors import CliError
from api.cli.output import print_table, remark
from api.cli.quantize import read_spec
from api.cli.verify import count_stored_bits, verify_folder
from api.cli.watch import watch_job

__all__ = ["demo_app"]

demo_app = typer.Typer(add_completion=False)

HOME = Path(".demo")
REPORT_FILE = "report.json"
QUESTION = "What is the capital of France, and what is it known for?"
# chosen so that the demo ends within minutes on two cores; the engine's own default trains longer
CALIBRATION = (
    "recipe=fast", "calibration.samples=16", "calibration.length=256", "calibration.epochs=2",
)  # fmt: skip
EVALUATION = {"enabled": True, "windows": 4, "length": 1024}


@demo_app.command()
def demo(
    *,
    spec: Annotated[str, typer.Option(help="w4a8, w3a8g64, w5a8, ...")] = "w4a8",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the spec; repeatable.")
    ] = None,
    home: Annotated[Path, typer.Option(help="Folder for model, data, log and report.")] = HOME,
    question: Annotated[str, typer.Option(help="What to ask the model.")] = QUESTION,
    json_output: JsonFlag = False,
) -> None:
    """Quantize, download, host and chat with a small real model, and print what was measured."""
    signal.signal(signal.SIGTERM, _end)
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    # a failing run must not leave the report of an earlier one
    (home / REPORT_FILE).unlink(missing_ok=True)
    wanted = read_spec(spec, [*CALIBRATION, *(setting or ())])
    try:
        report, manifest, total_s = _run(home, wanted, question)
    except BaseException:
        tail = log_tail(home)
        if tail:
            remark(tail, "dim")
        raise
    write_report(report, home / REPORT_FILE)
    if json_output:
        sys.stdout.write((home / REPORT_FILE).read_text(encoding="utf-8"))
    else:
        print_table(report_table(report, manifest, total_s))


def _run(
    home: Path, spec: str | dict[str, Any], question: str
) -> tuple[DemoReport, dict[str, Any], float]:
    _step("model", f"{MODEL_NAME}, from its package")
    models = home / "models"
    prepare_model(models)
    started = time.monotonic()
    _step("service", f"one machine, data in {home / 'data'}")
    with running_service(home, {"demo": models}) as client:
        job, seconds = _quantize(client, spec)
        _step("download", "every file, then every sha256 against the manifest")
        folder = home / "model"
        shutil.rmtree(folder, ignore_errors=True)
        artifact = download_artifact(client, job["id"], folder)
        manifest = verify_folder(folder, artifact["manifest_sha256"])
        text = _chat(client, job["id"], question)
        _step("stop", "the service, its worker and the hosted model")
    stored = count_stored_bits(folder, manifest["bits"]["quantized_weights"])
    perplexity = job["report"]["perplexity"]
    report = DemoReport(
        model=job["model"],
        w_bits=job["spec"]["w_bits"],
        a_bits=job["spec"]["a_bits"],
        group_size=job["spec"]["group_size"],
        ppl_fp=perplexity["fp"],
        ppl_quant=perplexity["quant"],
        bits_per_weight=stored.per_weight,
        bytes_fp=job["report"]["bytes_fp"],
        bytes_quant=job["report"]["bytes_quant"],
        seconds=round(seconds, 2),
        generated_text=text,
        manifest_ok=True,
    )
    return report, manifest, time.monotonic() - started


def _quantize(client: ApiClient, spec: str | dict[str, Any]) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    request = {"model": f"local:demo/{MODEL_NAME}", "spec": spec, "evaluation": EVALUATION}
    job = client.post("/v1/quantizations", request)
    _step("quantize", f"{job['notation']}, {job['id']}")
    job = watch_job(client, job["id"])
    if job["status"] != "succeeded":
        error = job.get("error") or {}
        raise CliError(f"the job is {job['status']}: {error.get('message', 'no reason given')}")
    if not job["report"].get("perplexity"):
        raise CliError("the job ended without perplexities; see the service's log")
    return job, time.monotonic() - started


def _chat(client: ApiClient, job_id: str, question: str) -> str:
    deployment = client.post("/v1/deployments", {"quantization_id": job_id})
    _step("host", f"as {deployment['name']}")
    wait_until_ready(client, deployment["id"])
    _step("ask", question)
    messages = [{"role": "user", "content": question}]
    request = {"model": deployment["name"], "messages": messages, "max_tokens": 64}
    reply = Reply()
    # progress goes to stderr, and the answer is progress until the report repeats it
    for piece in stream_chat(client, {**request, "temperature": 0}, reply):
        sys.stderr.write(piece)
        sys.stderr.flush()
    sys.stderr.write("\n")
    return reply.text.strip()


def _step(name: str, what: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold cyan]{name:>9}[/]  {what}")


def _end(_signal: int, _frame: FrameType | None) -> None:
    """Leave through the clean-up of every open block."""
    raise KeyboardInterrupt
