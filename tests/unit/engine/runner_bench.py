"""A runner with pages chosen at random, driven by hand."""

import numpy as np

from engine.inference.runner_options import RunnerOptions
from engine.inference.runner_start import start_runner
from engine.inference.sampler_state import SamplerState
from engine.inference.sampling_params import SamplingParams
from engine.inference.steps import SequenceStep, StepPlan
from tests.unit.engine.small_decoder import VOCABULARY, SmallDecoder

GREEDY = SamplingParams(temperature=0.0, seed=0)
PAGE = 16
MAX_SEQUENCES = 6


class Bench:
    """A runner, and sequences with pages of their own choice."""

    def __init__(self, decoder=None, **options):
        self.decoder = decoder or SmallDecoder()
        defaults = {"max_sequences": MAX_SEQUENCES, "max_step_tokens": 64, "pages": 40}
        self.options = RunnerOptions(**(defaults | options))
        self.sampler = SamplerState(
            self.options.max_sequences, self.decoder.vocabulary, self.decoder.device
        )
        self.runner = start_runner(self.decoder, self.sampler, self.options)
        self.free = np.random.default_rng(5).permutation(self.runner.pages).tolist()
        self.pages = {}

    def open(self, slot, params=GREEDY, prompt=(), drawn=()):
        self.runner.open(slot, params, prompt, drawn)
        self.pages[slot] = []

    def close(self, slot):
        self.runner.close(slot)
        self.free += self.pages.pop(slot)

    def step(self, slot, start, token_ids=(), *, draws=True, drafts=0):
        pages = self.pages[slot]
        while len(pages) * PAGE < start + max(1, len(token_ids)):
            pages.append(self.free.pop())
        return SequenceStep(
            slot=slot, start=start, token_ids=tuple(token_ids), page_ids=tuple(pages),
            draws=draws, drafts=drafts,
        )  # fmt: skip

    @staticmethod
    def bare_step(slot):
        return SequenceStep(slot=slot, start=0, token_ids=(), page_ids=(0,), draws=True)

    def run(self, *steps):
        return self.runner.launch(StepPlan(steps=steps)).wait().drawn


def text(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(VOCABULARY, size=length).tolist())
