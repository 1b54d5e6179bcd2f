"""Import rules, checked on syntax trees, and the four steps without extras/."""
import ast
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from tinyllm import optional

SCRIPTS = ("train_vocab", "preprocess", "train", "sample", "convert")
ALONE = ("model", "tokenizer")                      # import nothing of the repository
GROUPS = {                                          # of tinyllm/; each imports only itself and the groups below
    "run": ("presets", "resume", "estimate", "memory", "runlog", "run", "stops"),
    "net": ("kernels", "optim", "sampling", "checkpoint", "engine", "generator"),
    "data": ("project", "corpus", "documents", "demo_stories", "download", "words", "workers", "shards", "dataset"),
    "base": ("cli", "files", "machine", "compat", "device", "device_errors", "gpu_peaks", "distributed", "optional"),
}


def modules() -> dict[str, ast.Module]:
    """Map each module of the repository, such as tinyllm.cli, to its syntax tree."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("tinyllm", "extras", "tools"):
        paths += (ROOT / folder).rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}


TREES = modules()


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_of(module: str) -> set[str]:
    """Return the modules of the repository that a module imports, also inside functions."""
    nodes = list(ast.walk(TREES[module]))
    type_blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    never_run = {node for block in type_blocks for node in ast.walk(block)}
    names = [name for node in nodes if node not in never_run for name in imported_names(node)]
    parts = {name if name in TREES else name.rpartition(".")[0] for name in names}
    return parts & TREES.keys() - {module, "tinyllm"}


def rank(module: str) -> int:
    """Return the layer of a module. Imports must not point to a higher layer."""
    folder, _, name = module.rpartition(".")
    if folder == "tinyllm":
        return next(i for i, group in enumerate(reversed(GROUPS)) if name in GROUPS[group])
    return {"extras": 5, "tools": 7}.get(module.split(".")[0], 6 if module in SCRIPTS else -1)


def loaded_features(module: str) -> set[str]:
    """Return the names that a module passes to optional.load."""
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if ast.unparse(call.func) in ("optional.load", "load")
            and call.args and isinstance(call.args[0], ast.Constant)}


def test_every_module_belongs_to_a_group():
    inside = {f"tinyllm.{name}" for names in GROUPS.values() for name in names}
    assert {name for name in TREES if name.startswith("tinyllm.")} == inside
    assert {name for name in TREES if "." not in name} == {*SCRIPTS, *ALONE, "tinyllm", "extras", "tools"}
    assert (ROOT / "tinyllm" / "__init__.py").read_bytes() == b""


@pytest.mark.parametrize("module", TREES)
def test_imports_point_downwards(module):
    for other in imports_of(module):
        assert rank(other) <= rank(module), f"{module} imports {other}"
        assert other not in SCRIPTS or rank(module) > rank(other), f"{module} imports the script {other}"


@pytest.mark.parametrize("module", ALONE)
def test_model_and_tokenizer_are_standalone(module):
    assert imports_of(module) == set()


def test_no_import_cycles():
    TopologicalSorter({module: imports_of(module) for module in TREES}).prepare()


def test_scripts_and_tinyllm_load_extras_by_name_only():
    below = [module for module in TREES if module.split(".")[0] not in ("extras", "tools")]
    assert not [(module, other) for module in below for other in imports_of(module) if other.startswith("extras")]
    loaded = set().union(*(loaded_features(module) for module in below))
    files = {path.stem for path in (ROOT / "extras").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert loaded == set(optional.FEATURES)
    assert loaded == files - {"__init__", "__pycache__"}


STEPS = """
import importlib, sys
from tinyllm.cli import UserError
for line in sys.stdin:
    name, *args = line.split()
    sys.argv = [f"{name}.py", *args]
    try:
        importlib.import_module(name).main()
    except UserError as error:
        print("refused:", error)
"""
TINY = ("--dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --max_seq_len 32 --batch_size 2 --max_iters 2"
        " --eval_interval 1 --device cpu --compile False --sample_tokens 4")


def test_the_four_steps_run_without_extras(tmp_path):
    """In a copy of the repository, options from extras/ end in a one-line error."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tinyllm/*.*")):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    Path("stories.txt").write_text("<|endoftext|>".join(f"The cat saw {n} dogs. They ran away." for n in range(200)))
    commands = ("train_vocab --data stories.txt --vocab_size 300", "preprocess", f"train {TINY}",
                "sample --prompt The --max_new_tokens 4 --num_samples 1", "sample --interactive", "sample --show_probs",
                "sample --checkpoint some.gguf")
    run = subprocess.run([sys.executable, "-c", STEPS], input="\n".join(commands), capture_output=True, timeout=120,
                         encoding="utf-8", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert Path("output/ckpt.pt").exists() and "The" in run.stdout
    refusals = re.findall(r"refused: the folder extras/ is missing; it is needed for .*\n.*\n", run.stdout)
    assert len(refusals) == 3, run.stdout
