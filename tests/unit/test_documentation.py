"""What the pages say, held against the code where that is possible."""

import json
import re
from pathlib import Path

import pytest
import torch

from api import errors
from api.cli.main import COMMANDS
from engine.events import Stage
from engine.modules.rotated import ResidualRotation
from engine.numerics.affine import affine_params, dequantize_weight, quantize_weight, weight_range
from engine.orders import block_of, factors
from engine.spec import QuantSpec
from kernels.layouts import pack_codes
from tests.setting_variables import setting_variables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIENT_VARIABLES = {"ABQ_URL", "ABQ_API_KEY"}
"""Read by the command line, no settings of the service."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_on_a_page_is_a_setting(page):
    known = setting_variables() | CLIENT_VARIABLES

    assert set(re.findall(r"\bABQ_[A-Z_]+\b", page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_code_on_a_page_exists(page):
    paths = re.findall(r"`((?:api|worker|engine|kernels|docker)/[\w./]+\.\w+)`", page.read_text())

    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists(page):
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
    used = set(re.findall(r"^(?:\.venv/bin/)?abq (\w+)", blocks, re.MULTILINE))

    assert used <= set(COMMANDS)


def test_every_code_on_the_page_of_refusals_is_an_error():
    codes = {getattr(errors, name).code for name in errors.__all__}
    page = (ROOT / "docs/hub.md").read_text()
    table = page.split("## Refused")[1].split("## Pushed")[0]
    told = {code for row in re.findall(r"\| ([^|]+) \|$", table, re.MULTILINE)
            for code in re.findall(r"`(\w+)`", row)}  # fmt: skip

    assert told
    assert told <= codes


def test_the_page_of_the_interface_names_every_stage_in_order():
    page = (ROOT / "docs/api.md").read_text()

    assert ", ".join(Stage) in page


@pytest.mark.parametrize("spec", ["w3a16g32", "w4a8", "w2*a8"])
def test_the_decoder_on_the_page_of_the_format_reads_what_the_engine_packs(spec):
    page = (ROOT / "docs/checkpoint-format.md").read_text()
    scope = {}
    # the page's own code is what is tested
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)  # noqa: S102 - ours
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    grid = QuantSpec.from_notation(spec).weight_grid("x")
    params = affine_params(weight_range(weight, grid.group_of(96)), grid)
    codes = quantize_weight(weight, params, grid)

    packed = pack_codes(codes, grid.planes)
    read = scope["weight"](
        *(each.numpy() for each in (packed, params.scale, params.zero_point)), 96
    )

    assert torch.equal(torch.from_numpy(read), dequantize_weight(codes, params))


@pytest.mark.parametrize("n", [64, 96, 576, 148, 896, 11008])
def test_the_decoder_on_the_page_of_the_format_rotates_as_the_engine_does(n):
    page = (ROOT / "docs/checkpoint-format.md").read_text()
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1], scope)  # noqa: S102 - ours
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = factors(block_of(n))

    turned = scope["residual"](x.numpy(), 7, split)

    torch.testing.assert_close(
        torch.from_numpy(turned), ResidualRotation(n, 7)(x), rtol=0, atol=1e-12
    )
    back = scope["inverse"](turned, split) * scope["signs"](n, 7)
    torch.testing.assert_close(torch.from_numpy(back), x, rtol=0, atol=1e-12)


def test_the_page_of_the_interface_names_only_paths_that_are_served():
    page = (ROOT / "docs/api.md").read_text().split("## Keys")[0]
    served = json.loads((ROOT / "docs/openapi.json").read_text())["paths"]
    shapes = {re.sub(r"\{\w+\}", "{}", path) for path in served}
    told = {re.sub(r"\{\w+\}", "{}", path) for path in re.findall(r"(/[\w/{}]+)", page)}

    named = {path for path in told if path.startswith(("/v1", "/healthz", "/readyz", "/metrics"))}
    assert len(named) >= 10
    assert named <= shapes
