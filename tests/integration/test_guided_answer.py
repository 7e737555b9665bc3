"""The real model under a guide, token by token on the CPU."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.inference.guides import GuideCompiler
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import Guide, GuideKind, SamplingParams
from engine.inference.text import TextCodec
from tests.integration.test_smollm2 import smollm2  # noqa: F401  the fixture

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        "sound": {"enum": ["woof", "meow", "moo"]},
    },
    "required": ["legs", "sound"],
    "additionalProperties": False,
}


@torch.inference_mode()
def answer(folder, params, most):
    """What the model writes about a dog, up to its end token."""
    codec = TextCodec.from_directory(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = codec.encode("A dog as JSON:")
    state = SamplerState(1, model.config.vocab_size, "cpu", guides=GuideCompiler(codec))
    state.open(0, params, prompt)
    ids, new, cache = [], list(prompt), None
    while len(ids) < most:
        output = model(torch.tensor([new]), past_key_values=cache, logits_to_keep=1)
        cache = output.past_key_values
        state.send_guides([0])
        new = state.draw(output.logits[0], torch.tensor([0]), full=True).tolist()
        state.accept(0, new)
        if new[0] in codec.eos_ids:
            break
        ids += new
    return codec.decode(ids)


def test_an_answer_under_a_schema_is_a_document_of_it(smollm2):  # noqa: F811  the fixture
    guide = Guide(kind=GuideKind.JSON_SCHEMA, text=json.dumps(SCHEMA))
    params = SamplingParams(seed=5, temperature=0.8, guide=guide)

    found = json.loads(answer(smollm2, params, 24))

    assert set(found) == {"legs", "sound"}
    assert 0 <= found["legs"] <= 9
    assert found["sound"] in {"woof", "meow", "moo"}
