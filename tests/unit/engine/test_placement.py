"""Where hidden states live, and that it changes no result."""

import errno
import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch

from engine.calibration import placement as module
from engine.calibration.block import BlockShape
from engine.calibration.block_loop import BlockLoop
from engine.calibration.placement import ChainMemory, Place, Placement, free_bytes
from engine.calibration.resume import BlockStore
from engine.calibration.watch import BlockStep, Watch
from engine.errors import SpecError
from engine.events import LogLine
from engine.models.loading import SourceModel
from engine.models.rotated import RotatedModel
from engine.pipeline import QuantJob
from engine.recipe import Ingredients
from engine.spec import CalibrationSpec, QuantSpec, Recipe
from tests.tiny_models import save_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
ON_HOST, ON_DISK = ChainMemory(host_bytes=1 << 30), ChainMemory(host_bytes=0)
GIB = 1 << 30
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return SourceModel.open(save_tiny_model(tmp_path_factory.mktemp("model"), layers=LAYERS))


def loop_of(source, folder, memory=ON_HOST, **fields):
    calibration = CalibrationSpec(samples=3, length=32, epochs=2, batch=2)
    # attention maps and own outputs make every chain that there can be
    extra = Ingredients(own_input_loss=0.5, attention_loss=0.1)
    spec = QuantSpec(
        w_bits=3, group_size=32, recipe=Recipe.DEFAULT, ingredients=extra, calibration=calibration
    )
    values = {"model": source, "watch": Watch(on_event=lambda _: None), **fields}
    return BlockLoop(
        spec=spec,
        store=BlockStore.open(folder, "test"),
        device=CPU,
        shape=BlockShape.of(source.architecture, {}),
        memory=memory,
        **values,
    )


def blocks_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("chains", "memory", "device", "expected"),
    [
        (GIB, ChainMemory(device_bytes=GIB, host_bytes=GIB), GPU, Place.DEVICE),
        (GIB, ChainMemory(device_bytes=GIB - 1, host_bytes=GIB), GPU, Place.HOST),
        (GIB, ChainMemory(device_bytes=0, host_bytes=GIB - 1), GPU, Place.DISK),
        (GIB, ChainMemory(host_bytes=GIB), CPU, Place.HOST),
        (GIB, ChainMemory(device_bytes=2 * GIB, host_bytes=0), CPU, Place.DISK),
    ],
)
def test_chains_take_the_fastest_place_that_has_room(tmp_path, chains, memory, device, expected):
    chosen = Placement.choose(chains, 0, memory, device, tmp_path)

    assert chosen.place is expected


def test_without_a_budget_most_of_what_is_free_beside_the_block_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda _: 10 * GIB)

    places = [
        Placement.choose(size * GIB, 5 * GIB, ChainMemory(), CPU, tmp_path).place for size in (3, 4)
    ]

    assert places == [Place.HOST, Place.DISK]


def test_free_memory_counts_what_the_page_cache_would_give_back(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 900 kB\nMemFree: 10 kB\nMemAvailable:     700 kB\nSwapTotal: 0 kB\n")
    monkeypatch.setattr(module, "MEMORY_INFO", info)

    assert free_bytes(CPU) == 700 * 1024


def test_a_machine_that_does_not_tell_its_memory_is_named(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 900 kB\n")
    monkeypatch.setattr(module, "MEMORY_INFO", info)

    with pytest.raises(OSError, match="set the memory of the chains"):
        free_bytes(CPU)


def test_a_chain_on_disk_keeps_what_is_written_and_leaves_no_file(tmp_path):
    chain = Placement(place=Place.DISK, device=CPU, directory=tmp_path).empty((2, 3, 5))
    values = torch.randn(2, 3, 5)

    chain.copy_(values)

    assert torch.equal(chain, values)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_an_error_and_no_signal(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    on_disk = Placement(place=Place.DISK, device=CPU, directory=tmp_path)

    with pytest.raises(OSError, match="no room for 120 bytes of hidden states") as full:
        on_disk.empty((2, 3, 5))

    assert full.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["device_bytes", "host_bytes"])
def test_a_budget_below_zero_is_refused(field):
    with pytest.raises(SpecError, match=f"chain_memory.{field} = -1"):
        ChainMemory.from_json({field: -1})


def test_a_budget_is_read_from_json():
    assert ChainMemory.from_json({"host_bytes": 5}) == ChainMemory(host_bytes=5)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, ChainMemory()), ({"chain_memory": {"device_bytes": 0}}, ChainMemory(device_bytes=0))],
)
def test_a_job_may_say_what_the_chains_take(extra, expected):
    record = {
        "source_dir": "a", "out_dir": "b", "state_dir": "c", "spec": {"w_bits": 4},
        "source": {"repo": "acme/tiny", "revision": "main"},
        "evaluation": {"enabled": False, "windows": 1, "length": 32},
    }  # fmt: skip

    job = QuantJob.from_json(record | extra)

    assert job.chain_memory == expected


def test_chains_on_disk_give_the_bytes_of_chains_in_memory(source, tmp_path):
    told = []
    watch = Watch(on_event=told.append)

    in_memory = loop_of(source, tmp_path / "host").run(TOKENS)
    on_disk = loop_of(source, tmp_path / "disk", ON_DISK, watch=watch).run(TOKENS)

    assert in_memory.placement.place is Place.HOST
    assert on_disk.placement.place is Place.DISK
    assert torch.equal(on_disk.last_hidden, in_memory.last_hidden)
    assert on_disk.losses == in_memory.losses
    assert blocks_in(tmp_path / "disk") == blocks_in(tmp_path / "host")
    assert any("kept on disk" in e.message for e in told if isinstance(e, LogLine))


def test_a_run_on_disk_is_taken_up_in_memory(source, tmp_path):
    whole = loop_of(source, tmp_path / "whole").run(TOKENS)
    loop_of(source, tmp_path / "state", ON_DISK).run(TOKENS)
    for path in (tmp_path / "state").glob("block-00002.*"):
        path.unlink()

    again = loop_of(source, tmp_path / "state").run(TOKENS)

    assert torch.equal(again.last_hidden, whole.last_hidden)
    assert blocks_in(tmp_path / "state") == blocks_in(tmp_path / "whole")


@pytest.mark.parametrize("is_rotated", [False, True])
def test_a_block_is_gone_before_the_next_one_is_loaded(source, tmp_path, is_rotated):
    watched, alive = [], []

    class Watched(SourceModel):
        __slots__ = ()

        def load_block(self, index):
            alive.append(sum(each() is not None for each in watched))
            block = super().load_block(index)
            watched.extend(weakref.ref(each) for each in block.parameters() if each.dim() == 2)
            return block

    values = {name: getattr(source, name) for name in SourceModel.__dataclass_fields__}
    model = Watched(**values)
    gc.collect()
    # what only the collector of cycles would find is memory that is not free when it is needed
    gc.disable()
    try:
        seen = RotatedModel(source=model, seed=1) if is_rotated else model
        loop_of(source, tmp_path, model=seen).run(TOKENS)
    finally:
        gc.enable()

    assert alive == [0] * LAYERS


def test_rotating_a_block_lets_go_of_what_it_replaces(source):
    loaded, held = [], []

    class Watched(SourceModel):
        __slots__ = ()

        def load_block(self, index):
            block = super().load_block(index)
            loaded.extend(weakref.ref(each) for each in block.parameters() if each.dim() == 2)
            return block

    values = {name: getattr(source, name) for name in SourceModel.__dataclass_fields__}
    turned = RotatedModel(source=Watched(**values), seed=1)
    block = turned.load_block(0)
    held.append(sum(each() is not None for each in loaded))

    assert len(loaded) == len([each for each in block.parameters() if each.dim() == 2])
    assert held == [0]


def test_a_block_is_loaded_where_it_shall_run(source):
    block = replace(source, block_device=torch.device("meta")).load_block(0)

    assert {each.device.type for each in block.parameters()} == {"meta"}


def test_the_steps_of_a_block_are_told_in_order(source, tmp_path):
    steps = []
    watch = Watch(on_event=lambda _: None, on_step=steps.append)

    loop_of(source, tmp_path, watch=watch).run(TOKENS)

    assert steps == LAYERS * [
        BlockStep.LOADING,
        BlockStep.TEACHING,
        BlockStep.MEASURING,
        BlockStep.STATISTICS,
        BlockStep.MOMENTS,
        BlockStep.MEASURING,
        BlockStep.TRAINING,
        BlockStep.MEASURING,
        BlockStep.PASSING,
        BlockStep.SAVING,
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_place_gives_the_same_bytes_on_a_gpu(source, tmp_path):
    budgets = {
        Place.DEVICE: ChainMemory(device_bytes=GIB),
        Place.HOST: ChainMemory(device_bytes=0, host_bytes=GIB),
        Place.DISK: ChainMemory(device_bytes=0, host_bytes=0),
    }
    written = {}
    for place, memory in budgets.items():
        loop = replace(loop_of(source, tmp_path / place, memory), device=GPU)
        assert loop.run(TOKENS).placement.place is place
        written[place] = blocks_in(tmp_path / place)

    assert written[Place.HOST] == written[Place.DEVICE]
    assert written[Place.DISK] == written[Place.DEVICE]
