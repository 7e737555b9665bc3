"""The engine without the service: `python -m engine quantize DIR OUT --spec w4a8`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.calibration.dataset import (
    BuiltinText,
    consecutive_windows,
    load_tokenizer,
    read_text,
    tokenize,
)
from engine.calibration.placement import ChainMemory
from engine.calibration.watch import Watch
from engine.checkpoint.reader import load_checkpoint
from engine.console import EventPainter, progress_bar
from engine.datasets import TaskFamily
from engine.errors import EngineError
from engine.evaluation.perplexity import measure_perplexity
from engine.evaluation.plan import EvaluationPlan, EvaluationText
from engine.models.blocks import BlockModel, ResidentModel
from engine.models.gguf import import_gguf
from engine.models.loading import SourceModel, read_config
from engine.pipeline import QuantJob, QuantReport, best_device, quantize_model
from engine.spec import FULL_BITS, CalibrationSpec, QuantSpec, Recipe
from engine.target import BitTarget

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 when the engine refused."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        match options.command:
            case "quantize":
                _quantize(options, console)
            case "perplexity":
                _perplexity(options, console)
            case _:
                import_gguf(options.file, options.out)
    except EngineError as error:
        console.print(f"[red]{error.code}[/red]: {error.message}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default=best_device())
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = CalibrationSpec()
    quantize = commands.add_parser("quantize", help="quantize a model directory")
    quantize.add_argument("model", type=Path)
    quantize.add_argument("out", type=Path)
    quantize.add_argument("--spec", default="w4a8", help="for example w4a8, w2*a8, w4a16g64")
    quantize.add_argument("--recipe", type=Recipe, choices=list(Recipe), default=Recipe.LWC)
    quantize.add_argument("--samples", type=int, default=defaults.samples)
    quantize.add_argument("--length", type=int, default=defaults.length)
    quantize.add_argument("--epochs", type=int, default=defaults.epochs)
    quantize.add_argument("--seed", type=int, default=defaults.seed)
    quantize.add_argument("--text", type=Path, default=None, help="calibration text")
    quantize.add_argument("--state", type=Path, default=None, help="where finished layers are kept")
    for place in ("device", "host"):
        quantize.add_argument(
            f"--chain-{place}-bytes", type=int, help="for hidden states; measured if not given"
        )
    _add_target(quantize)
    _add_evaluation(quantize)
    quantize.add_argument(
        "--no-divergence", dest="divergence", action="store_false", help="perplexity alone"
    )
    quantize.add_argument(
        "--tasks", type=TaskFamily, nargs="+", default=[], choices=list(TaskFamily)
    )
    perplexity = commands.add_parser("perplexity", help="measure a source or a checkpoint")
    perplexity.add_argument("model", type=Path)
    _add_evaluation(perplexity)
    gguf = commands.add_parser("import-gguf", help="turn a GGUF file into a model directory")
    gguf.add_argument("file", type=Path)
    gguf.add_argument("out", type=Path)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    goals = parser.add_argument_group(
        "search for the bits of every layer"
    ).add_mutually_exclusive_group()
    goals.add_argument("--target-bits", type=float, help="average stored bits per weight")
    goals.add_argument("--target-bytes", type=int, help="all stored tensors")
    goals.add_argument("--target-increase", type=float, help="of perplexity; 0.05 is 5 per cent")
    choices = BitTarget.__dataclass_fields__
    parser.add_argument(
        "--w-choices", type=int, nargs="+", default=choices["w_choices"].default, metavar="BITS"
    )
    parser.add_argument(
        "--a-choices", type=int, nargs="+", default=choices["a_choices"].default, metavar="BITS"
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    plan = EvaluationPlan()
    parser.add_argument("--eval-text", type=Path, nargs="+", default=[], help="builtin if none")
    parser.add_argument("--eval-windows", type=int, default=plan.windows, help="0 measures nothing")
    parser.add_argument("--eval-length", type=int, default=plan.length)


def _quantize(options: argparse.Namespace, console: Console) -> None:
    calibration = CalibrationSpec(
        samples=options.samples,
        length=options.length,
        epochs=options.epochs,
        seed=options.seed,
    )
    out: Path = options.out
    job = QuantJob(
        source_dir=options.model,
        out_dir=out,
        state_dir=options.state or out.with_name(f".{out.name}.state"),
        spec=QuantSpec.from_notation(
            options.spec,
            recipe=options.recipe,
            calibration=calibration,
            target=_read_target(options),
        ),
        repo=options.model.name,
        calibration_text=options.text,
        evaluation=EvaluationPlan(
            enabled=options.eval_windows > 0,
            windows=options.eval_windows,
            length=options.eval_length,
            texts=_texts(options.eval_text),
            divergence=options.divergence,
            tasks=tuple(options.tasks),
        ),
        device=options.device,
        chain_memory=ChainMemory(
            device_bytes=options.chain_device_bytes, host_bytes=options.chain_host_bytes
        ),
    )
    with progress_bar(console) as bar:
        report = quantize_model(job, Watch(on_event=EventPainter(bar)))
    Console().print(_table(report))


def _read_target(options: argparse.Namespace) -> BitTarget | None:
    goals = {
        "average_bits": options.target_bits,
        "max_bytes": options.target_bytes,
        "perplexity_increase": options.target_increase,
    }
    if all(each is None for each in goals.values()):
        return None
    return BitTarget(
        **goals, w_choices=tuple(options.w_choices), a_choices=tuple(options.a_choices)
    )


def _perplexity(options: argparse.Namespace, console: Console) -> None:
    plan = EvaluationPlan(windows=options.eval_windows, length=options.eval_length)
    model, kv_bits = _open_any(options.model, options.device)
    tokenizer = load_tokenizer(options.model)
    for wanted in _texts(options.eval_text):
        text = read_text(wanted.path, BuiltinText.EVALUATION)
        ids = tokenize(tokenizer, text)
        windows = consecutive_windows(text, ids, plan.windows, plan.length)
        windows.check_vocabulary(model.architecture.vocab)
        with progress_bar(console) as bar:
            measured = measure_perplexity(
                model,
                windows.tokens,
                Watch(on_event=EventPainter(bar)),
                kv_bits=kv_bits,
                device=options.device,
            )
        Console().print(
            f"perplexity {measured.value:.4f} over {measured.tokens} tokens of {text.name}"
        )


def _texts(paths: Sequence[Path]) -> tuple[EvaluationText, ...]:
    return tuple(EvaluationText(path=path) for path in paths) or EvaluationPlan().texts


def _open_any(directory: Path, device: str) -> tuple[BlockModel, int]:
    """Open a source model or a checkpoint, and say what its keys and values are rounded to."""
    if "quantization_config" not in read_config(directory):
        return SourceModel.open(directory), FULL_BITS
    loaded = load_checkpoint(directory, device)
    model = ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)
    return model, loaded.spec.kv_bits


def _table(report: QuantReport) -> Table:
    table = Table(show_header=False)
    record = report.to_json()
    measured = record.pop("evaluation")
    for name, value in record.items():
        table.add_row(name, str(value))
    for text in measured["texts"]:
        table.add_row(text["dataset"], text["message"] or str(text["perplexity"]))
        if text["divergence"] is not None:
            table.add_row("divergence", str(text["divergence"]))
    for task in measured["tasks"]:
        table.add_row(task["family"], task["message"] or str(task["scores"]))
    return table


if __name__ == "__main__":
    sys.exit(main())
