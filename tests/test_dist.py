"""What `make dist` built: everything a user needs, nothing else, and an import that is quick."""

import os
import re
import statistics
import subprocess
import sys
import tarfile
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

ROOT = Path(__file__).parents[1]
ROOMS = ("metris_blocks", "reference_model")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = (ROOT / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist() -> Path:
    (found,) = (ROOT / "dist").glob("*.tar.gz")
    return found


def tracked(*folders: str) -> set[str]:
    """The files of some folders that git knows, or would without being told to ignore them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def test_wheel_holds_every_file_of_both_packages_and_no_other(wheel):
    names = set(ZipFile(wheel).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == tracked(*ROOMS)
    assert {"metris_blocks/py.typed", "reference_model/presets/metris_tiny.yaml"} <= ours
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_wheel_asks_for_torch_and_einops_alone(wheel):
    (name,) = (name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    about = Parser().parsestr(ZipFile(wheel).read(name).decode())
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">=")[0] for line in needed) == ["einops", "torch"]
    assert about["License-Expression"] == "Apache-2.0"
    version = {"__version__": ""}
    exec((ROOT / "metris_blocks/__init__.py").read_text().rsplit("\n", 2)[1], version)
    assert about["Version"] == version["__version__"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {about['Version']}\n" in citation
    # One of the words that CFF 1.2 lists.
    assert re.findall(r"^ *status: (.*)$", citation, re.MULTILINE) == ["submitted"]


def test_sdist_holds_sources_and_tests_and_nothing_that_was_made(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert names >= tracked(*ROOMS, "tests", "examples") | {
        "CITATION.cff",
        "THIRD_PARTY_NOTICES.md",
        "LICENSE",
        "README.md",
    }
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"demo", ".venv", "dist", "build", "runs", ".git", ".ci"}
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".png"))]


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A Python that sees the wheel, einops, and torch with what that needs: no other package."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    wanted = needed_by("torch") | {"einops"}
    for entry in Path(torch.__file__).parents[1].iterdir():
        # Packages, modules and extension modules, but no .pth file that would lead elsewhere.
        if entry.name.split(".")[0].lower() in wanted and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    return python


def needed_by(package: str) -> set[str]:
    """Names of the modules that importing a package brings in a fresh process, beyond Python's own."""
    probe = f"import sys, {package}; print(*{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found = set(out.stdout.split()) - sys.stdlib_module_names
    return {name.lower() for name in found} | {package, "nvidia", "torchgen", "functorch"}


EXTRACT = """
import torch
from metris_blocks import VisualExpressionExtractor
out = VisualExpressionExtractor(16, 8, 8)(torch.randn(1, 9, 16), torch.randn(1, 3, 8))
out.tokens.sum().backward()
import metris_blocks, importlib.util
assert 'site-packages' in metris_blocks.__file__, metris_blocks.__file__
assert not [name for name in ('timm', 'transformers', 'hypothesis') if importlib.util.find_spec(name)]
print('works', metris_blocks.__version__)
"""


def run(python: Path, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_wheel_works_beside_torch_and_einops_alone(clean, tmp_path):
    found = run(clean, EXTRACT, tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("works")


def test_command_says_what_it_lacks_beside_torch_and_einops_alone(clean, tmp_path):
    found = run(clean, "import sys; from reference_model.__main__ import main; sys.exit(main())", tmp_path)
    assert found.returncode == 2
    assert "pip install 'metris-blocks[reference]'" in found.stderr and len(found.stderr.splitlines()) == 1


def test_import_takes_less_than_300_ms_beyond_torch(clean, tmp_path):
    clock = "time.perf_counter()"
    code = f"import torch, time; start = {clock}; import metris_blocks; print({clock} - start)"
    seconds = [float(run(clean, code, tmp_path).stdout) for _ in range(5)]
    print(f"import metris_blocks beyond torch: {1000 * statistics.median(seconds):.0f} ms")
    assert statistics.median(seconds) < 0.3
