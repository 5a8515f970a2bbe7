"""The wheel holds the library alone, and works where there is nothing else of this project."""

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRAIN = """
    import importlib.util, os
    from pathlib import Path

    import torch
    from torch import nn

    import dora_lightning
    from dora_lightning import AdapterConfig, inject_adapters, merge_adapters

    assert Path(dora_lightning.__file__).is_relative_to(os.environ["EXPECTED"]), dora_lightning.__file__
    assert (Path(dora_lightning.__file__).parent / "py.typed").is_file()
    # names as common as these must not come with the wheel
    assert not any(importlib.util.find_spec(name) for name in ("tasks", "datamodules", "benchmarks"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inject_adapters(model, AdapterConfig(rank=2))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(50):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    expected = model(x)
    torch.testing.assert_close(merge_adapters(model, unload=True)(x), expected)
    assert type(model[0]) is nn.Linear
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it; needs the build backend, from an index or installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "hatchling" in done.stderr:
        pytest.skip("the build backend is not to be had without a network")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"dora_lightning", info}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dora_lightning").rglob("*.py")}
    packed = {name for name in names if name.startswith("dora_lightning/")}
    assert sources | {"dora_lightning/py.typed"} == packed
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_trains_a_module_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # its dependencies are those of this environment; a path file would also run the one of the editable installation
    dependencies = next(path for path in sys.path if (Path(path) / "torch" / "__init__.py").is_file())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join([purelib, dependencies]), "EXPECTED": purelib}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = {"cwd": elsewhere, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([python, "-c", textwrap.dedent(TRAIN)], **run)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([scripts / "dora-lightning", "--help"], **run)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
