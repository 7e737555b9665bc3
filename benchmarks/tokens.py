"""Microseconds of gates at few tokens, by the programs that share a token and their warps.

python -m benchmarks.tokens                       gates, plain and in front of a transform
python -m benchmarks.tokens --tokens 16 32        of so many tokens, instead of 1, 4 and 8
python -m benchmarks.tokens --toy --device cpu    whether it runs at all

A launch follows its like in a CUDA graph and starts early, as at decode. Gates have every bit of
the reference; in front of a transform a code may be one off, and the table says whether the bits
are those of one program. A wrong launch has no time, and the run ends with an error.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Method, WrongResultError, time_launches
from benchmarks.warming import describe, run_ahead
from engine.numerics.hadamard import factors_of
from kernels import quantize_tokens as tokens
from kernels import rotated_tokens as rotated
from kernels.layer_math import Gate
from kernels.token_parts import make_slots
from kernels.tokens import TokenCodes

__all__ = ["CASES", "TOY", "GateCase", "main"]

FORM = tokens.TokenForm(bits=8)
MOST_APART = 0.01
"""Codes of a transformed token that may be one off."""
COPIES = 2
PARTS = (1, 2, 4, 8, 16)
FEW = (1, 4, 8)
METHOD = Method(rotate_bytes=0, replays=20, graph_us=400.0)
TOY_METHOD = Method(rotate_bytes=0, replays=2)
COMPILE_S = 120.0
TASK_CONFIGS = 3
"""Launches that one process compiles."""
Config = tokens.LaunchConfig | rotated.LaunchConfig
Fields = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCase:
    """M tokens of K features behind a SiLU gate, to codes of 8 bits."""

    k: int
    m: int = 1
    block: int | None = None
    """Channels of a transform; None has none."""

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.k} m{self.m}" + ("" if self.block is None else f", blocks of {self.block}")

    @property
    def chosen(self) -> Config:
        """What the decoder launches."""
        if self.block is not None:
            transform = _transform(self.block, torch.device("cpu"))
            return rotated.select_config(self.k, transform, m=self.m, shared=True)
        return tokens.select_config(tokens.row_block(self.k), m=self.m, gated=True)

    @property
    def configs(self) -> list[Config]:
        """Launches to compare, for any number of tokens alike."""
        if self.block is None:
            return [
                tokens.LaunchConfig(num_warps=warps, parts=parts, launch_pdl=True)
                for parts in PARTS
                for warps in (4, 8)
            ]
        chosen, is_one = replace(self, m=1).chosen, self.block == self.k
        assert isinstance(chosen, rotated.LaunchConfig)
        alone = rotated.LaunchConfig(launch_pdl=True)
        # a part of one block has 16 columns, or more; 16 warps would hold its channels twice
        most = chosen.parts if is_one else PARTS[-1]
        sizes = [(8, 32), (8, 64), (8, 128)] if is_one else [(4, chosen.chunk), (8, chosen.chunk)]
        shared = [
            replace(chosen, parts=parts, num_warps=warps, chunk=chunk)
            for parts in PARTS[1:]
            if parts <= most
            for warps, chunk in sizes
        ]
        return [alone, *shared]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileTask:
    """Launches of one case, for another process."""

    case: GateCase
    configs: Sequence[Config]


CASES = tuple(
    GateCase(k=k, block=block, m=m)
    for k, block in ((11008, None), (14336, None), (28672, None), (11008, 256), (14336, 14336))
    for m in FEW
)
TOY = (GateCase(k=96), GateCase(k=256, block=256))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, measure, print the table."""
    options = _parser().parse_args(arguments)
    device, console = torch.device(options.device), Console(width=132)
    torch.manual_seed(options.seed)
    wanted = [replace(case, m=m) for case in CASES if case.m == FEW[0] for m in options.tokens]
    cases = TOY if options.toy else wanted
    if device.type == "cuda":
        _compile_all(cases, options.workers, console)
    table = Table(
        "gate", "programs x warps, chunk: us; no: not the bits of one program", "best", "chosen"
    )
    for case in cases:
        table.add_row(*_row(case, device, TOY_METHOD if options.toy else METHOD))
    console.print(table)


def compile_launches(task: CompileTask) -> str | None:
    """Launch once each, in a process of its own; what went wrong, or None."""
    device = torch.device("cuda")
    try:
        launch, _ = _prepare(task.case, device)
        for config in task.configs:
            launch(0, config)
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  a launch may fail in any way
        return f"{task.case.label}: {describe(error)}"
    return None


def _compile_all(cases: Sequence[GateCase], workers: int, console: Console) -> None:
    tasks = [
        CompileTask(case=case, configs=case.configs[first : first + TASK_CONFIGS])
        # any number of tokens has the same kernels
        for case in dict.fromkeys(replace(case, m=1) for case in cases)
        for first in range(0, len(case.configs), TASK_CONFIGS)
    ]
    for answer in run_ahead(compile_launches, tasks, workers=workers, seconds=COMPILE_S):
        if answer is not None:
            console.print(answer, markup=False)


def _row(case: GateCase, device: torch.device, method: Method) -> tuple[str, str, str, str]:
    launch, check = _prepare(case, device)
    found: dict[Config, float] = {}
    texts = []
    alone = launch(0, case.configs[0])
    for config in case.configs if device.type == "cuda" else case.configs[:1]:

        def run(index: int, config: Config = config) -> Fields:
            return launch(index, config)

        try:
            us = time_launches(run, COPIES, check, method).us
        except WrongResultError as error:
            raise WrongResultError(f"{case.label}, {config}: {error}") from error
        same = all(torch.equal(a, b) for a, b in zip(run(0), alone, strict=True))
        found[config] = us
        texts.append(f"{_name(config)}: {us:.2f}{'' if same else ' no'}")
    best = min(found, key=lambda config: found[config])
    chosen = next((config for config in found if _name(config) == _name(case.chosen)), None)
    told = "not tried" if chosen is None else f"{found[chosen]:.2f}"
    return case.label, "  ".join(texts), f"{_name(best)}: {found[best]:.2f}", told


def _prepare(
    case: GateCase, device: torch.device
) -> tuple[Callable[[int, Config], Fields], Callable[[Fields], bool]]:
    """A launch of a copy of the tokens, and whether its output is right."""
    slots = make_slots(device)
    xs = [torch.randn(case.m, 2 * case.k, device=device).bfloat16() for _ in range(COPIES)]
    transform = None if case.block is None else _transform(case.block, device)

    def reference(x: torch.Tensor) -> TokenCodes:
        if transform is None:
            return tokens.quantize_gated_reference(x, Gate.SILU, FORM)
        return rotated.quantize_rotated_reference(x, transform, FORM, step=Gate.SILU)

    def launch(index: int, config: Config) -> Fields:
        x = xs[index]
        if device.type == "cpu":
            return _fields(reference(x))
        if transform is None:
            assert isinstance(config, tokens.LaunchConfig)
            return _fields(tokens.quantize_gated(x, Gate.SILU, FORM, config=config, slots=slots))
        assert isinstance(config, rotated.LaunchConfig)
        return _fields(
            rotated.quantize_rotated(x, transform, FORM, step=Gate.SILU, config=config, slots=slots)
        )

    expected = [_fields(reference(x)) for x in xs]
    is_right = _is_equal if transform is None else _is_close
    return launch, lambda output: any(is_right(output, right) for right in expected)


def _is_equal(output: Fields, right: Fields) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(output, right, strict=True))


def _is_close(output: Fields, right: Fields) -> bool:
    codes, scale, _, sums = output
    apart = (codes.int() - right[0].int()).abs()
    return (
        bool(torch.isclose(scale, right[1], rtol=1e-2).all())
        and int(apart.max()) <= 1
        and float((apart > 0).float().mean()) < MOST_APART
        and torch.equal(sums, codes.sum(1, keepdim=True, dtype=torch.int32))
    )


def _fields(written: TokenCodes) -> Fields:
    return written.codes, written.scale, written.zero_point, written.sums


def _transform(block: int, device: torch.device) -> rotated.Transform:
    parts = factors_of(block, device)
    return rotated.Transform(left=parts.left, right=parts.right)


def _name(config: Config) -> str:
    name = f"{config.parts}x{config.num_warps}"
    return name if isinstance(config, tokens.LaunchConfig) else f"{name}c{config.chunk}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny gates, to see that it runs")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(FEW), metavar="M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="processes that compile ahead")
    return parser


if __name__ == "__main__":
    main()
