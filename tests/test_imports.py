"""The architecture, checked by walking every file's syntax tree: which module imports which."""

import ast
import functools
import importlib.util
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"common": 0, "data": 1, "models": 2, "rewards": 3, "training": 4, "synth": 5}  # package → its layer
SCRIPT_LAYER = 6
FREE = {"tests", "benchmarks"}  # may import anything
# Within synth; folders of one layer do not import each other.
ROOMS = {"shared": 0, "teacher": 1, "offline": 1, "pipeline": 2, "evolution": 3, "tuning": 4, "commands": 5}
COMMANDS = {"synth/run.py", "synth/evolve.py", "synth/tune.py"}
# The PyTorch script uses these, and it never imports mlx.
NEUTRAL = [
    *("common.cli", "common.errors", "common.files", "common.locate", "common.parser"),
    *("data.batching", "data.chat", "data.check", "data.decoding", "data.digits", "data.examples", "data.flags"),
    *("data.constraints", "data.generate_constraint_data", "data.generate_digit_data", "data.prompts", "data.records"),
    *("data.sources", "data.subjects", "data.tokenizer"),
    *("models.adapter_config", "rewards.combined", "rewards.digits", "rewards.function", "training.checkpoint_folders"),
    *("training.advantages", "training.flags", "training.losses", "training.metrics", "training.plots"),
    *("training.ppo", "training.ppo_flags", "training.ppo_loop", "training.ppo_step", "training.ranks"),
    *("training.rollout", "training.samples", "training.settings", "training.trackers", "training.trl_config"),
    *("training.trl_stats", "training.trl_trainer"),
]


FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
)
# Run folders and the demo's output are the user's, not the project's.
FILES = [path for path in FILES if path.parent == ROOT or path.relative_to(ROOT).parts[0] in {*PACKAGES, *FREE}]
SCRIPTS = {path.stem for path in FILES if path.parent == ROOT}


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


@functools.cache
def imports(path):
    """(line, module) of every import in a file, including those inside functions."""
    return list(_imports(path))


def _imports(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            yield node.lineno, node.module
            # `from training import ppo` imports training.ppo
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(path):
    part = path.relative_to(ROOT).parts[0]
    return SCRIPT_LAYER if path.parent == ROOT else PACKAGES[part]


def room_of(name):
    """The subfolder of synth of a file: `synth/teacher/cache.py` → teacher."""
    if name in COMMANDS:
        return "commands"
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else "shared"


def faults(path):
    """Imports that go upward, from script to script, or from one system of synth to another beside it."""
    for line, module in imports(path):
        top = module.partition(".")[0]
        if top in SCRIPTS:
            yield f"{name_of(path)}:{line} imports the script {top}"
        elif top in FREE:
            yield f"{name_of(path)}:{line} imports {top}"
        elif PACKAGES.get(top, -1) > layer_of(path):
            yield f"{name_of(path)}:{line} imports {module}, which lies above it"
        elif top == "synth" and name_of(path).startswith("synth/") and _is_file(module):
            here, there = room_of(name_of(path)), room_of(module.replace(".", "/") + ".py")
            if here != there and ROOMS[there] >= ROOMS[here]:
                yield f"{name_of(path)}:{line} imports {module}, which does not lie below it"


def test_the_walk_sees_the_project():
    assert {"sft", "ppo_training", "fuse", "talk_to_model"} <= SCRIPTS
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"data", "models", "rewards", "training", "tests"}
    assert ("training.ppo" in {module for _, module in imports(ROOT / "training/ppo_step.py")}) is True


def test_imports_go_downward_only():
    held = [path for path in FILES if path.relative_to(ROOT).parts[0] not in FREE]
    # demo.py starts the scripts as processes, so it is one of them.
    assert [fault for path in held for fault in faults(path)] == []


def test_modules_import_each_other_without_cycles():
    edges = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] not in PACKAGES:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        edges[module] = {imported for _, imported in imports(path) if _is_file(imported)}
    done = set()

    def visit(module, above):
        assert module not in above, f"import cycle: {' → '.join([*above, module])}"
        if module not in done:
            for imported in edges.get(module, ()):
                visit(imported, [*above, module])
            done.add(module)

    for module in edges:
        visit(module, [])


def _is_file(module):
    return (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_no_module_has_the_name_of_a_dependency_or_of_the_standard_library():
    # A script's own folder comes first on the path: a data/json.py would hide json from data/generate_digit_data.py.
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    taken -= {*PACKAGES, *FREE, "__main__"}  # the packages' own names are looked at below
    assert [name_of(path) for path in FILES if path.stem in taken and not path.stem.startswith("__")] == []


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_package_has_the_name_of_a_dependency(package):
    requirements = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt"))
    assert package not in requirements.split()
    assert package not in sys.stdlib_module_names
    found = importlib.util.find_spec(package)
    assert found is None or Path(str(found.origin)).resolve().parent == ROOT / package


def test_neutral_modules_import_neither_mlx_nor_torch():
    code = (
        "import importlib, sys\n"
        f"for name in {NEUTRAL!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = sorted({m.partition('.')[0] for m in sys.modules} & {'mlx', 'mlx_lm', 'torch', 'transformers'})\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_data_module_is_held_to_that():
    modules = {f"data.{path.stem}" for path in FILES if path.parent == ROOT / "data"}
    assert modules - {"data.__init__"} <= set(NEUTRAL)


def is_mlx(module):
    return module.partition(".")[0] in ("mlx", "mlx_lm")


def reached_from(path):
    """Every module that importing `path` may import, through ours."""
    found, waiting = set(), [path]
    while waiting:
        for _, module in imports(waiting.pop()):
            if module not in found:
                found.add(module)
                if _is_file(module):
                    waiting.append((ROOT / module.replace(".", "/")).with_suffix(".py"))
    return found


def test_what_is_for_pytorch_reaches_no_mlx():
    script = ROOT / "pytorch_ppo_training.py"
    for path in (script, ROOT / "training/torch_trainer.py"):
        assert not [module for module in reached_from(path) if is_mlx(module)]
    assert "torch" in reached_from(script) and "mlx.core" in reached_from(ROOT / "ppo_training.py")


def enables(path):
    """The line of the top level that calls cpu.enable(), perhaps only where the file is run; None if there is none."""
    for node in tree_of(path).body:
        inner = node.body if isinstance(node, ast.If) else [node]
        if any(isinstance(x, ast.Expr) and ast.unparse(x) == "cpu.enable()" for x in inner):
            return node.lineno
    return None


def is_run(path):
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree_of(path).body)


RUN = [path for path in FILES if is_run(path) and path.parent.name not in ("tests", "data")]
RUN = [path for path in RUN if any(is_mlx(module) for module in reached_from(path))]


def test_the_walk_finds_what_is_run():
    assert {"sft.py", "synth/run.py", "models/tiny.py", "benchmarks/mlx_step.py"} <= {name_of(path) for path in RUN}
    assert not {"pytorch_ppo_training.py", "models/loading.py"} & {name_of(path) for path in RUN}


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_what_is_run_calls_cpu_enable_before_it_imports_mlx(path):
    line = enables(path)
    before = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    before = [node for node in before if line is None or node.lineno < line]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in before}
    reach = {name for name in names if is_mlx(name) or (_is_file(name) and any(map(is_mlx, _reached(name))))}
    assert reach == set(), f"{name_of(path)} imports {reach} before cpu.enable()"


def _reached(module):
    return reached_from((ROOT / module.replace(".", "/")).with_suffix(".py"))


def test_what_is_run_by_its_module_s_name_is_not_imported_by_its_package():
    """Else runpy warns of it on every `python -m`."""
    paths = [path for path in FILES if is_run(path) and path.parent != ROOT and path.name != "__main__.py"]
    modules = {name_of(path).removesuffix(".py").replace("/", ".") for path in paths}
    modules -= {"models.cpu.blas"}  # run by the file's name, since the Makefile calls it before anything is installed
    assert {"data.check", "synth.run", "synth.pipeline.report"} <= modules
    code = (
        "import importlib, sys\n"
        f"for name in {sorted({module.rpartition('.')[0] for module in modules})!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(sorted({modules!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_no_module_calls_cpu_enable_on_being_imported():
    libraries = [path for path in FILES if path not in RUN and name_of(path) != "tests/conftest.py"]
    assert [name_of(path) for path in libraries if enables(path)] == []


def arrays_at_import(path):
    """Calls of mlx's functions that run when the file is imported: they would start the device there."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[0] == "mx":
                yield f"{name_of(path)}:{call.lineno} calls {ast.unparse(call.func)} on being imported"


def test_no_library_makes_an_array_on_being_imported():
    """A process that forks after Metal was started crashes on macOS."""
    held = [path for path in FILES if path.relative_to(ROOT).parts[0] not in FREE and path.parent != ROOT]
    assert [fault for path in held for fault in arrays_at_import(path)] == []


def test_an_array_made_on_being_imported_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "models.py"
    path.write_text("import mlx.core as mx\nTWO = mx.array(2.0)\ndef f():\n    return mx.array(1)\n", encoding="utf-8")
    assert list(arrays_at_import(path)) == ["models.py:2 calls mx.array on being imported"]


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(path):
    """Uses of what reads or writes code as data."""
    for line, module in imports(path):
        if module.partition(".")[0] in BANNED_MODULES:
            yield f"{name_of(path)}:{line} imports {module}"
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        unpickles = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
        if called in ("eval", "exec", "torch.save", "torch.load") or unpickles:
            yield f"{name_of(path)}:{node.lineno} calls {called}"


def test_nothing_unpickles_or_evaluates():
    assert [danger for path in FILES for danger in dangers(path)] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "eval('1')", "exec('1')", "import torch\ntorch.save(1, 'f')",
     "import numpy as np\nnp.load('f', allow_pickle=True)", "def f():\n    import joblib"],
)  # fmt: skip
def test_each_danger_would_be_found(tmp_path, monkeypatch, code):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "bad.py"
    path.write_text(code, encoding="utf-8")
    assert list(dangers(path))


@pytest.mark.parametrize(
    ("file", "code"),
    [("data/a.py", "from training import config"), ("models/a.py", "def f():\n    import training.flags"),
     ("training/a.py", "import sft"), ("sft.py", "from ppo_training import main"), ("rewards/a.py", "import tests"),
     ("training/a.py", "from tests.frameworks import FRAMEWORKS"), ("synth/a.py", "import synth.teacher.b"),
     ("synth/teacher/a.py", "from synth.offline import b"), ("synth/pipeline/a.py", "from synth.evolution import b"),
     ("synth/evolution/a.py", "from synth.tuning import b"), ("synth/tuning/a.py", "from synth.run import main")],
)  # fmt: skip
def test_each_wrong_direction_would_be_found(tmp_path, monkeypatch, file, code):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for module in ("teacher/b", "offline/b", "evolution/b", "tuning/b", "run"):
        (tmp_path / "synth" / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "synth" / f"{module}.py").touch()
    path.write_text(code, encoding="utf-8")
    assert list(faults(path))
