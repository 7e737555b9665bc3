"""Planning the memory of a runner and starting it.

A GPU's memory is measured: weights are there already, one step of the most tokens and one of the
most sequences show what a step takes beside them, and pages get what is left of the given fraction.
What captured graphs will hold is reserved by an estimate and reported as it came out.
"""

from dataclasses import replace

import torch

from engine.inference.chunk_graphs import chunk_sizes
from engine.inference.decoder.batch import TokenBatch
from engine.inference.memory_plan import MemoryPlan, count_pages, useful_tokens
from engine.inference.paged_runner import PagedRunner
from engine.inference.ports import TokenDecoder, TokenSampler
from engine.inference.runner_options import CPU_PAGES, RunnerOptions
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import MAX_SCORED_TOKENS, SequenceStep, StepPlan
from kernels.kv_pages import KvPages

__all__ = ["plan_memory", "start_runner", "warm_up"]

BYTES_PER_GRAPH = 12 << 20
"""Of the nodes of one size and its draws; estimated, the pool comes on top."""
LEAST_CHUNK = 16


def start_runner(
    decoder: TokenDecoder,
    sampler: TokenSampler,
    options: RunnerOptions,
) -> PagedRunner:
    """Plan memory, allocate, capture and warm up.

    Args:
        decoder: the model, on its device.
        sampler: of ``max_sequences`` slots.
        options: sizes.

    Raises:
        OutOfMemory: if no keys and values fit.
    """
    runner = PagedRunner(decoder, sampler, plan_memory(decoder, options), options)
    if decoder.device.type == "cuda":
        warm_up(runner, options.max_step_tokens)
    return runner


@torch.inference_mode()
def plan_memory(decoder: TokenDecoder, options: RunnerOptions) -> MemoryPlan:
    """Say what memory goes to.

    Raises:
        OutOfMemory: if no keys and values fit.
    """
    page_bytes = _page_bytes(decoder, options)
    workspace_bytes = graph_bytes = 0
    pages, kv_bytes = options.pages, options.kv_bytes
    if decoder.device.type == "cuda":
        # kernels are launched on the current device, which need not be the model's
        with torch.cuda.device(decoder.device):
            workspace_bytes, graph_bytes = _measure_steps(decoder, options)
        if kv_bytes is None:
            free_bytes, _ = torch.cuda.mem_get_info(decoder.device)
            share = int(free_bytes * options.memory_fraction)
            kv_bytes = share - workspace_bytes - graph_bytes
    elif kv_bytes is None and pages is None:
        pages = CPU_PAGES
    if pages is None:
        assert kv_bytes is not None, "without pages there is a budget"
        pages = min(
            count_pages(kv_bytes, page_bytes, options.page_size), _useful_pages(decoder, options)
        )
    return MemoryPlan(
        weight_bytes=decoder.weight_bytes,
        workspace_bytes=workspace_bytes,
        graph_bytes=graph_bytes,
        page_bytes=page_bytes,
        pages=pages,
    )


def warm_up(runner: PagedRunner, max_step_tokens: int) -> None:
    """Run prompts of many lengths, so that no request waits for a compiler.

    Args:
        runner: of which no slot is open.
        max_step_tokens: the longest.
    """
    longest = min(max_step_tokens, runner.context_length)
    lengths = {longest}
    chunk = LEAST_CHUNK
    while chunk < longest:
        # kernels are compiled apart for numbers that 16 divides and others
        lengths |= {chunk, chunk - 1}
        chunk *= 2
    for tokens in sorted(lengths):
        pages = tuple(range(-(-tokens // runner.page_size)))
        step = SequenceStep(slot=0, start=0, token_ids=(0,) * tokens, page_ids=pages, draws=True)
        _run_alone(runner, step)
        # never replayed; up to 128 tokens the head has as many rows
        scored = step.token_ids[-MAX_SCORED_TOKENS:]
        _run_alone(runner, replace(step, draws=False, score_ids=scored))
    if runner.max_sequences > 1 and runner.pages > 1:
        _run_beside(runner, min(LEAST_CHUNK, longest))


def _run_beside(runner: PagedRunner, tokens: int) -> None:
    """Decode beside a prompt, of which attention is another kernel's than of either alone."""
    one, prompt = (
        SequenceStep(slot=slot, start=0, token_ids=(0,) * count, page_ids=(slot,), draws=True)
        for slot, count in enumerate((1, tokens))
    )
    for step in (one, prompt):
        runner.open(step.slot, SamplingParams(temperature=0.0, seed=0), ())
    runner.launch(StepPlan(steps=(one, prompt))).wait()
    for step in (one, prompt):
        runner.close(step.slot)


def _run_alone(runner: PagedRunner, step: SequenceStep) -> None:
    runner.open(step.slot, SamplingParams(temperature=0.0, seed=0), ())
    runner.launch(StepPlan(steps=(step,))).wait()
    runner.close(step.slot)


def _useful_pages(decoder: TokenDecoder, options: RunnerOptions) -> int:
    longest = min(options.context_length or decoder.context_length, decoder.context_length)
    return -(-useful_tokens(options.max_sequences, longest) // options.page_size)


def _page_bytes(decoder: TokenDecoder, options: RunnerOptions) -> int:
    layers = decoder.new_pages(1, kv_bits=options.kv_bits, page_size=options.page_size)
    return sum(each.bytes_per_token * each.page_size for each in layers)


def _measure_steps(decoder: TokenDecoder, options: RunnerOptions) -> tuple[int, int]:
    """Bytes that the largest step takes, and an estimate of what graphs will hold."""
    device, page_size = decoder.device, options.page_size
    limit = min(options.context_length or decoder.context_length, decoder.context_length)
    tokens = options.max_step_tokens
    longest = min(tokens, limit)
    # beside the guesses and a token of every other sequence some of a prompt are scored
    drawn = options.max_sequences * (1 + options.draft_tokens)
    rows = min(drawn + MAX_SCORED_TOKENS, tokens)
    chunk = _chunk_batch(tokens, longest, rows, page_size, device)
    prompts, pages = chunk.block_table.shape
    kv = decoder.new_pages(prompts * pages, kv_bits=options.kv_bits, page_size=page_size)
    decode = _decode_batch(options.max_sequences, pages, device)
    workspace_bytes = _peak_bytes(decoder, chunk, kv)
    pool_bytes = _peak_bytes(decoder, decode, kv)
    del kv
    torch.cuda.empty_cache()
    if not options.use_graphs:
        return workspace_bytes, 0
    chunks = chunk_sizes(decoder, options)
    if chunks:
        pool_bytes = max(pool_bytes, workspace_bytes)
    # a pool keeps whole segments, of which a part stays empty
    sizes = len(options.buckets_on(device.type)) + len(chunks)
    return workspace_bytes, sizes * BYTES_PER_GRAPH + 2 * pool_bytes


def _peak_bytes(decoder: TokenDecoder, batch: TokenBatch, kv: tuple[KvPages, ...]) -> int:
    torch.cuda.synchronize(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    torch.cuda.reset_peak_memory_stats(decoder.device)
    logits = decoder.forward(batch, kv)
    # draws look at logits in float32 at most
    peak_bytes = torch.cuda.max_memory_allocated(decoder.device) + 4 * logits.numel()
    torch.cuda.synchronize(decoder.device)
    return peak_bytes - before


def _chunk_batch(
    tokens: int, longest: int, rows: int, page_size: int, device: torch.device
) -> TokenBatch:
    """Prompts as few as hold the tokens, as if the last were wanted by so many sequences."""
    number = torch.arange(tokens, device=device)
    pages, prompts = -(-longest // page_size), -(-tokens // longest)
    ends = torch.tensor([*range(0, tokens, longest), tokens], dtype=torch.int32, device=device)
    table = torch.arange(prompts * pages, dtype=torch.int32, device=device)
    return TokenBatch(
        token_ids=torch.zeros_like(number, dtype=torch.int32),
        positions=(number % longest).int(),
        kv_slots=number // longest * pages * page_size + number % longest,
        block_table=table.view(prompts, pages),
        lengths=ends.diff(),
        cu_seqlens=ends,
        decodes=0,
        logit_rows=number[-rows:],
    )


def _decode_batch(sequences: int, pages: int, device: torch.device) -> TokenBatch:
    """Sequences at their first token, all in page 0."""
    zeros = torch.zeros(sequences, dtype=torch.int32, device=device)
    return TokenBatch(
        token_ids=zeros,
        positions=zeros,
        kv_slots=zeros.long(),
        block_table=zeros.unsqueeze(1).repeat(1, pages),
        lengths=zeros + 1,
        decodes=sequences,
    )
