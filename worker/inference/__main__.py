"""`python -m worker.inference`: the models of one GPU, or of the CPU, behind a private port."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import uvicorn

from api.settings import Settings
from api.telemetry import configure_logging
from engine.inference.engine import EngineOptions
from worker.inference.app import create_app
from worker.inference.artifacts import ArtifactFolder
from worker.inference.generation import Generations
from worker.inference.metrics import InferenceMetrics
from worker.inference.pool import ModelPool
from worker.inference.server import DrainingServer

SPARE_THREADS = 8


def main() -> None:
    """Serve until a signal ends it."""
    settings = Settings()
    configure_logging(settings.log_level)
    if settings.inference.threads is not None:
        torch.set_num_threads(settings.inference.threads)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    inference = settings.inference
    # generations hold a thread each, and loads and prompts must find one beside them
    threads = ThreadPoolExecutor(
        inference.max_running + SPARE_THREADS, thread_name_prefix="inference"
    )
    asyncio.get_running_loop().set_default_executor(threads)
    shelf = ArtifactFolder(
        root=settings.storage_root,
        device=inference.device,
        options=EngineOptions(
            max_sequences=inference.max_running,
            max_waiting=inference.max_waiting,
            kv_bytes=inference.kv_bytes,
            context_length=inference.context_length,
            head_bits=inference.head_bits,
            draft_tokens=inference.draft_tokens,
        ),
    )
    pool = ModelPool(
        shelf,
        budget_bytes=inference.memory_bytes,
        load_timeout_s=inference.load_timeout_s,
        idle_unload_s=inference.idle_unload_s,
    )
    metrics = InferenceMetrics(pool.entries)
    generations = Generations(
        pool, metrics, max_waiting=inference.max_waiting, max_running=inference.max_running
    )
    token = None if inference.token is None else inference.token.get_secret_value()
    address = urlsplit(inference.url)
    config = uvicorn.Config(
        create_app(pool, generations, metrics, token),
        host=address.hostname or "127.0.0.1",
        port=address.port or 8001,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    await DrainingServer(config, pool, generations, drain_s=inference.drain_s).serve()


if __name__ == "__main__":
    # artifacts are local folders; nothing in this process may go to the network for them
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
