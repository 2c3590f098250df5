"""The rules of the house that a machine can hold: what exists, what imports what, what is said is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastsft": ROOT / "fastsft", "fastsft_kernels": ROOT / "kernels" / "fastsft_kernels"}

# What a layer may import of this project, besides itself. Lower layers never import higher ones.
LAYERS = [
    ("fastsft_kernels", set()),
    ("fastsft.errors", set()),
    ("fastsft.disk", set()),
    ("fastsft.device", {"errors"}),
    ("fastsft.builtin", {"errors"}),
    ("fastsft.config", {"errors"}),
    ("fastsft.data", {"errors", "config", "builtin", "model.files"}),
    (
        "fastsft.model",
        {"errors", "config", "builtin", "data", "console", "device", "disk", "fastsft_kernels"},
    ),
    ("fastsft.integrations", {"model", "fastsft_kernels"}),
    ("fastsft.rounding", set()),
    ("fastsft.optim", {"errors", "config", "rounding"}),
    ("fastsft.checkpoint", {"errors", "config", "disk"}),
    ("fastsft.run_folder", {"errors", "config", "checkpoint", "disk"}),
    ("fastsft.metrics", {"errors", "config", "optim"}),
    ("fastsft.reporters", {"errors", "config", "metrics"}),
    ("fastsft.plot", {"errors", "metrics"}),
    ("fastsft.console", {"errors"}),
    ("fastsft.selfcheck", {"errors", "fastsft_kernels"}),
    ("fastsft.doctor", {"errors", "console", "device", "selfcheck", "fastsft_kernels"}),
]


def python_files():
    return sorted(f for folder in PACKAGES.values() for f in folder.rglob("*.py"))


def module_of(path):
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = [f"fastsft.{alias.name}" for alias in node.names]
            yield from inner if node.module == "fastsft" else [node.module]


def test_kernels_is_not_a_package():
    """Hugging Face ships a package called `kernels` which transformers imports: ours would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.pyi").exists()


@pytest.mark.parametrize("layer,allowed", LAYERS, ids=[name for name, _ in LAYERS])
def test_imports_point_down(layer, allowed):
    wrong = []
    for path in python_files():
        module = module_of(path)
        if module != layer and not module.startswith(layer + "."):
            continue
        for name in imports_of(path):
            if name.split(".")[0] in ("bench", "tests"):
                wrong.append(f"{module} imports {name}")
            if name.split(".")[0] not in PACKAGES or name == layer or name.startswith(layer + "."):
                continue
            short = name.removeprefix("fastsft.")
            if not any(short == a or short.startswith(a + ".") for a in allowed):
                wrong.append(f"{module} imports {name}")
    assert not wrong, wrong


def test_every_module_has_a_layer():
    known = [name for name, _ in LAYERS]
    outer = "__main__ cli trainer run evaluate plan_command preparation rehearsal"
    top = {"fastsft", *(f"fastsft.{name}" for name in outer.split())}
    loose = [
        m
        for m in map(module_of, python_files())
        if m not in top and not any(m == k or m.startswith(k + ".") for k in known)
    ]
    assert not loose, f"not in LAYERS: {loose}"


def test_files_and_functions_stay_small():
    too_long = []
    for path in python_files():
        text = path.read_text()
        if text.count("\n") > 600:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if "kernels" in path.parts else 60
                size = node.end_lineno - node.lineno + 1
                if size > limit:
                    too_long.append(f"{path.relative_to(ROOT)}:{node.name}: {size} lines")
    assert not too_long, too_long


def test_every_module_says_what_it_is():
    silent = [
        str(p.relative_to(ROOT))
        for p in python_files()
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent, silent


def test_no_exec_and_nothing_swallowed():
    """`except Exception` may only translate an error, so its block must raise."""
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("exec", "eval"):
                found.append(f"{path.name}:{node.lineno} {node.func.id}")
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or getattr(node.type, "id", "") == "Exception"
                if broad and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
                    found.append(f"{path.name}:{node.lineno} swallows every error")
    assert not found, found


def test_help_needs_nothing_heavy():
    """`fastsft --help` answers at once: none of these may be imported for it."""
    heavy = "torch transformers numpy pydantic datasets tokenizers rich yaml".split()
    code = (
        "import sys\nfrom fastsft.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]", done.stderr
    assert "train" in done.stdout and "merge" in done.stdout


def test_readme_tree_is_true():
    """Every path the README's tree names exists, and every package folder is named in it."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.S)
    assert block, "README.md has no block between <!-- tree --> and ```"
    named, parents = [], []
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name]
        named.append("/".join(p.strip("/") for p in parents))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing
    for folder in (ROOT / "fastsft", ROOT / "fastsft" / "data", ROOT / "fastsft" / "model"):
        for path in folder.glob("*.py"):
            relative = str(path.relative_to(ROOT))
            if path.name not in ("__init__.py", "__main__.py"):
                assert relative in named, f"README's tree does not name {relative}"


def test_public_kernels_have_a_reference_and_a_test():
    import fastsft_kernels
    from fastsft_kernels import reference

    tests = "".join(p.read_text() for p in (ROOT / "tests" / "kernels").glob("*.py"))
    ops = "rms_norm rope swiglu geglu varlen_attention cross_entropy linear_cross_entropy nf4_quantize"
    for op in [*ops.split(), "nf4_dequantize", "lora_linear"]:
        assert hasattr(fastsft_kernels, op) and hasattr(reference, op), op
        assert op in tests, f"{op} has no test"


def test_test_files_have_different_names():
    """pytest imports them by name alone, so of two with one name the second is not collected."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
