"""The house rules a reviewer should not have to remember: imports, what loads what, what has a test."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "metris_blocks").rglob("*.py"))
MODEL = sorted((ROOT / "reference_model").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
FILES = [*LIBRARY, *MODEL, *BENCHMARKS, *EXAMPLES]
OURS = {"metris_blocks", "reference_model", "benchmarks", "examples", "tests"}

OP_STEMS = sorted({path.stem for path in (ROOT / "metris_blocks/ops").glob("*.py")} - {"__init__", "shapes"})
BLOCK_STEMS = sorted({path.stem for path in (ROOT / "metris_blocks").glob("*.py")} - {"__init__", "layers"})

OPS = ("metris_blocks.ops",)
LAYERS = (*OPS, "metris_blocks.layers")
BLOCKS = tuple(f"metris_blocks.{stem}" for stem in BLOCK_STEMS if stem != "extractor")

# model | data <- scoring <- training | viewing <- cli, ablate, app, info, profile; figures <- viewing. Rooms
# beside a bar do not know each other; files and configs are known to all.
_BELOW = {
    "files": (),
    "configs": (),
    "model": (),
    "data": (),
    "scoring": ("model", "data"),
    "training": ("scoring", "model", "data"),
    "figures": (),
    "viewing": ("scoring", "model", "data", "figures"),
    "presets": (),
}
_ROOMS = tuple(_BELOW)
_TOP = {
    "ablate": (),
    "app": (),
    "completion": ("cli",),
    "info": (),
    "profile": (),
    "cli": ("ablate", "app", "info", "profile"),
    "__main__": ("cli",),
}


def allowed(path: Path) -> tuple[str, ...]:
    """The modules of ours that a file may import, everything below them included."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "benchmarks":
        return ("metris_blocks", "reference_model", "benchmarks")
    if parts[0] == "examples":
        # An example reads on its own: the library, and what all of them share. That makes the scenes.
        return ("metris_blocks", "reference_model" if parts[1] == "scenes" else "examples.scenes")
    if parts[0] == "metris_blocks":
        if parts[1] == "ops":
            return OPS
        if parts[1] == "__init__":
            return (*BLOCKS, "metris_blocks.extractor")
        return {"layers": OPS, "extractor": (*LAYERS, *BLOCKS)}.get(parts[1], LAYERS)
    room = parts[1]
    if room == "__init__":
        return ("metris_blocks", "reference_model")
    if room in _TOP:
        inside = (*_ROOMS, *_TOP[room])
    else:
        assert room in _BELOW, f"{path.relative_to(ROOT)}: no room of this name in HOUSE's table"
        inside = (room, *_BELOW[room], "files", *(["configs"] if room != "files" else []))
    return ("metris_blocks", *(f"reference_model.{name}" for name in inside))


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports, in functions too unless ``module_level``."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join((*base, *([child.module] if child.module else [])))
                # `from a.b import c` may import the module a.b.c.
                for alias in child.names:
                    deeper = ROOT.joinpath(*module.split("."), alias.name)
                    is_module = deeper.is_dir() or deeper.with_suffix(".py").exists()
                    yield f"{module}.{alias.name}" if is_module else module
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def outside(path: Path, **options: bool) -> set[str]:
    """Top-level packages that a file imports and that are neither ours nor Python's."""
    return {name.split(".")[0] for name in imports(path, **options)} - OURS - sys.stdlib_module_names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh process after ``statement``."""
    probe = f"import sys\n{statement}\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split("LOADED", 1)[1].split())


# ------------------------------------------------------------------------------------------ who imports whom


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_inward(path):
    may = allowed(path)
    for name in imports(path):
        if name.split(".")[0] in OURS:
            assert any(name == ok or name.startswith(ok + ".") for ok in may), f"{relative(path)} -> {name}"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_needs_torch_and_einops_only(path):
    optional = {"xformers", "triton"} if "backends" in path.parts else set()
    assert outside(path) <= {"torch", "einops"} | optional
    # Optional kernels are imported where they run, never where a file is read: but for these, read when run.
    kernels = {"triton"} if path.parent.name == "kernels" else set()
    assert outside(path, module_level=True) <= {"torch", "einops"} | kernels


@pytest.mark.parametrize("path", sorted((ROOT / "metris_blocks/ops/backends").glob("*.py")), ids=relative)
def test_backends_do_not_know_each_other(path):
    others = {f"metris_blocks.ops.backends.{p.stem}" for p in path.parent.glob("*.py") if p != path}
    assert not others & set(imports(path))


@pytest.mark.parametrize("path", [*MODEL, *BENCHMARKS], ids=relative)
def test_optional_kernels_stay_behind_the_backends(path):
    assert not {"xformers", "triton"} & outside(path)


@pytest.mark.parametrize("path", BENCHMARKS, ids=relative)
def test_encoders_stay_in_the_reference_model(path):
    assert not {"timm", "transformers"} & outside(path)


def test_no_file_of_a_room_has_the_name_of_a_room_or_of_a_command():
    """So that a name says where to look: the command app is served by viewing/web_page.py."""
    names = {*_ROOMS, *_TOP} - {"__main__", "presets"}  # presets holds no code
    assert [
        relative(path) for path in MODEL if len(path.parts) > len(ROOT.parts) + 2 and path.stem in names
    ] == []


def test_oracle_needs_torch_alone():
    assert set(imports(ROOT / "tests/paper.py")) - sys.stdlib_module_names == {"torch"}


# ------------------------------------------------------------------------------------------- what loads what


def test_importing_the_library_loads_no_kernels_and_no_encoders():
    heavy = {"xformers", "triton", "timm", "transformers", "reference_model", "tests"}
    # Some builds of torch import triton themselves.
    assert heavy & (loaded_by("import metris_blocks") - loaded_by("import torch")) == set()


def test_config_files_load_without_torch():
    configs = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODEL
        if path.stem in ("config", "configs")
    ]
    assert configs, "HOUSE: each room keeps its dataclasses in its own config.py"
    for config in configs:
        assert "torch" not in loaded_by(f"import {config}"), f"import {config} loads torch"


# ----------------------------------------------------------------------------------------- one stem, one room


@pytest.mark.parametrize("stem", BLOCK_STEMS)
def test_every_block_has_a_test_that_compiles_it_and_a_benchmark(stem):
    assert "assert_compiles_once(" in (ROOT / "tests/blocks" / f"test_{stem}.py").read_text()
    # A guidance set is torch.cat: there is nothing to be faster than.
    assert stem == "guidance" or (ROOT / "benchmarks" / f"bench_{stem}.py").exists()


@pytest.mark.parametrize("stem", OP_STEMS)
def test_every_op_has_a_test_and_a_benchmark(stem):
    assert (ROOT / "tests/ops" / f"test_{stem}.py").exists()
    assert (ROOT / "benchmarks" / f"bench_{stem}.py").exists()


@pytest.mark.parametrize("stem", OP_STEMS)
def test_every_op_is_tested_in_five_groups(stem):
    text = (ROOT / "tests/ops" / f"test_{stem}.py").read_text()
    for sign in ("from tests", "@given", "gradcheck(", "assert_compiles_once(", "pytest.raises("):
        assert sign in text, f"tests/ops/test_{stem}.py lacks {sign}"


@pytest.mark.parametrize("room", ["metris_blocks", "metris_blocks.ops"])
def test_public_names_are_listed_documented_and_tested(room):
    module = __import__(room, fromlist=["__all__"])
    tests = "".join(
        path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
    )
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{room}.{name} has no docstring"
        assert name in tests or name.startswith(("Curation", "VisualExpression")), f"{name} has no test"
