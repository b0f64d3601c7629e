"""The house rules a reviewer should not have to remember: imports, what loads what, what has a test."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "metris_blocks").rglob("*.py"))
MODEL = sorted((ROOT / "reference_model").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
FILES = [*LIBRARY, *MODEL, *BENCHMARKS, *EXAMPLES]
OURS = {"metris_blocks", "reference_model", "benchmarks", "examples", "tests"}

SHARED_BY_OPS = {"__init__", "shapes", "masks"}
OP_STEMS = sorted({path.stem for path in (ROOT / "metris_blocks/ops").glob("*.py")} - SHARED_BY_OPS)
BLOCK_STEMS = sorted({path.stem for path in (ROOT / "metris_blocks").glob("*.py")} - {"__init__", "layers"})

LAYERS = ("metris_blocks.ops", "metris_blocks.layers")
BLOCKS = tuple(f"metris_blocks.{stem}" for stem in BLOCK_STEMS if stem != "extractor")

# Of reference_model: room or file -> the rooms and files that it may import, itself and PLAIN apart.
PLAIN = ("files", "configs", "presets")
BELOW: dict[str, tuple[str, ...]] = {
    "files": (),
    "configs": (),
    "presets": (),
    "processes": (),
    "tokens": (),
    "cost": (),
    "model": ("tokens",),
    "data": ("tokens", "processes"),
    "figures": (),
}
BELOW["checkpoints"] = ("model", "data", "tokens", "processes")
BELOW["synthetic"] = ("data",)
BELOW["scoring"] = ("checkpoints", *BELOW["checkpoints"])
BELOW["training"] = ("scoring", "cost", *BELOW["scoring"])
BELOW["viewing"] = ("scoring", "figures", *BELOW["scoring"])
BELOW["profile"] = ("model", "cost", "processes")
BELOW["info"] = ("scoring", "viewing")
BELOW["app"] = ("viewing", "synthetic", "training", *BELOW["viewing"])
BELOW["ablate"] = ("training", "viewing", *BELOW["viewing"])
BELOW["cli"] = tuple(BELOW)
BELOW["__main__"] = ("cli",)


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
            return ("metris_blocks.ops",)
        if parts[1] == "__init__":
            return (*BLOCKS, "metris_blocks.extractor")
        return {"layers": LAYERS[:1], "extractor": (*LAYERS, *BLOCKS)}.get(parts[1], LAYERS)
    if parts[1] == "__init__":
        return ("reference_model",)
    assert parts[1] in BELOW, f"{relative(path)}: no room of this name in the table BELOW"
    rooms = (parts[1], *BELOW[parts[1]], *(PLAIN if parts[1] != "files" else ()))
    return ("metris_blocks", *(f"reference_model.{room}" for room in rooms))


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


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh process after ``statement``."""
    probe = f"import sys\n{statement}\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split("LOADED", 1)[1].split())


# ------------------------------------------------------------------------------------------ who imports whom


def test_no_import_runs_up():
    offenders = []
    for path in FILES:
        may = allowed(path)
        for name in imports(path):
            inside = any(name == ok or name.startswith(ok + ".") for ok in may)
            if name.split(".")[0] in OURS and not inside:
                offenders.append(f"{relative(path)} -> {name}")
    assert offenders == []


def test_no_imports_run_in_a_circle():
    ours = {dotted(path): path for path in FILES}
    waiting = {name: {other for other in imports(path) if other in ours} for name, path in ours.items()}
    # A package's own __init__ is run by whoever imports from the package, which makes no circle by itself.
    waiting = {name: others - {name} for name, others in waiting.items()}
    # Take away those at the bottom and those at the top, until only circles stay.
    while ready := [
        name
        for name, others in waiting.items()
        if not others & waiting.keys() or not any(name in others for others in waiting.values())
    ]:
        for name in ready:
            del waiting[name]
    assert sorted(waiting) == [], "each of these imports itself through others"


def test_packages_stay_in_their_rooms():
    offenders = []

    def refuse(path: Path, packages: set[str], why: str) -> None:
        offenders.extend(f"{relative(path)} imports {package}: {why}" for package in sorted(packages))

    for path in LIBRARY:
        optional = {"xformers", "triton"} if "backends" in path.parts else set()
        refuse(path, outside(path) - {"torch", "einops"} - optional, "the library needs torch and einops")
        # Optional kernels are imported where they run, never where a file is read: but for these.
        kernels = {"triton"} if path.parent.name == "kernels" else set()
        refuse(path, outside(path, module_level=True) & optional - kernels, "imported where it runs")
    backends = sorted((ROOT / "metris_blocks/ops/backends").glob("*.py"))
    for path in backends:
        others = {dotted(other) for other in backends if other != path and other.stem != "opaque"}
        refuse(path, others & set(imports(path)), "backends do not know each other")
    for path in (*MODEL, *BENCHMARKS):
        refuse(path, {"xformers", "triton"} & outside(path), "kernels stay behind the backends")
    for path in BENCHMARKS:
        refuse(path, {"timm", "transformers"} & outside(path), "encoders stay in the reference model")
    refuse(
        oracle := ROOT / "tests/support/paper.py", outside(oracle) - {"torch"}, "the oracle needs torch alone"
    )
    assert offenders == []


def test_no_file_of_a_room_has_the_name_of_a_room_or_of_a_command():
    """So that a name says where to look: the command app is served by app/page.py."""
    inside = [path for path in MODEL if path.parent != ROOT / "reference_model"]
    assert [relative(path) for path in inside if path.stem in BELOW.keys() - {"__main__", "presets"}] == []


# ------------------------------------------------------------------------------------------- what loads what


def test_importing_the_library_loads_no_kernels_and_no_encoders():
    heavy = {"xformers", "triton", "timm", "transformers", "reference_model", "tests"}
    # Some builds of torch import triton themselves.
    assert heavy & (loaded_by("import metris_blocks") - loaded_by("import torch")) == set()


def test_config_files_load_without_torch():
    configs = [dotted(path) for path in MODEL if path.stem in ("config", "configs")]
    assert configs, "each room keeps its dataclasses in its own config.py"
    assert "torch" not in loaded_by("; ".join(f"import {config}" for config in configs))


# ----------------------------------------------------------------------------------------- one stem, one room


def test_every_stem_has_its_tests_and_its_benchmark():
    lacking = []

    def ask(path: str, *signs: str) -> None:
        file = ROOT / path
        text = file.read_text() if file.exists() else ""
        lacking.extend(
            f"{path}: {sign}" for sign in signs or ("is missing",) if not file.exists() or sign not in text
        )

    for stem in BLOCK_STEMS:
        ask(f"tests/blocks/test_{stem}.py", "assert_compiles_once(")
        if stem not in (
            "guidance",
            "cue",
        ):  # torch.cat, and a row or a mean: there is nothing to be faster than
            ask(f"benchmarks/bench_{stem}.py", "def bench_")
    for stem in OP_STEMS:
        groups = ("from tests", "@given", "gradcheck(", "assert_compiles_once(", "pytest.raises(")
        ask(f"tests/ops/test_{stem}.py", *groups)
        ask(f"benchmarks/bench_{stem}.py", "def bench_")
    assert lacking == []


def test_public_names_are_listed_documented_and_tested():
    tests = "".join(
        path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
    )
    lacking = []
    for room in ("metris_blocks", "metris_blocks.ops"):
        module = __import__(room, fromlist=["__all__"])
        for name in module.__all__:
            if not getattr(module, name).__doc__:
                lacking.append(f"{room}.{name} has no docstring")
            if name not in tests and not name.startswith(("Curation", "VisualExpression")):
                lacking.append(f"{room}.{name} has no test")
    assert lacking == []
