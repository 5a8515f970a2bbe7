"""Under torch.compile every method computes what it computes without, forward and backward, and no norm is stale.

All cases share one process of their own: the shape checks that are on in tests are wrappers that no graph can hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "vera": {"method": "vera", "rank": 4},
    "dora": {"method": "dora", "rank": 4, "dropout": 0.3},
    "dora, exact dropout": {"method": "dora", "rank": 4, "dropout": 0.3, "exact_dropout": True},
    "dora, gradient of the norm": {"method": "dora", "rank": 4, "detach_norm": False},
    "dvora": {"method": "dvora", "rank": 4},
    "magnitude": {"method": "magnitude"},
}
ONE_GRAPH = set(CASES) - {"vera"}
"""Those whose forward pass is one graph; VeRA's pair is drawn in the first pass, outside of it."""

SCRIPT = """
import copy, json, sys, traceback
import torch
from torch import nn
from dora_lightning.adapters import AdapterConfig, inject_adapters

def compare(options, fullgraph):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8))
    inject_adapters(model, AdapterConfig(target_modules="all-linear", **options))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    pairs = [(a, b) for a, b in zip(model.parameters(), twin.parameters()) if a.requires_grad]
    optimizers = [torch.optim.SGD(parameters, lr=0.05) for parameters in zip(*pairs)]
    x = torch.randn(5, 12)
    for step in range(4):
        outputs = []
        for function, optimizer in zip((compiled, twin), optimizers):
            function.train(step < 2)
            torch.manual_seed(step)  # of dropout
            optimizer.zero_grad()
            outputs.append(function(x))
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close([a.grad for a, _ in pairs], [b.grad for _, b in pairs])
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        for pair in pairs:
            for parameter in pair:
                parameter.data.mul_(1.5)
        torch.testing.assert_close(compiled(x), twin(x))

failures = {}
for name, (options, fullgraph) in json.loads(sys.argv[1]).items():
    try:
        compare(options, fullgraph)
    except Exception:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong, by case."""
    cases = json.dumps({name: (options, name in ONE_GRAPH) for name, options in CASES.items()})
    done = subprocess.run([sys.executable, "-c", SCRIPT, cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_compiling_changes_no_number(failures: dict[str, str], case: str) -> None:
    assert case not in failures, failures[case]
