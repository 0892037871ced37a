"""The structure that the README draws: three storeys, no import upwards, no circles, a light `import jaxllm`."""

import ast
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"pallas_kernels": "pallas_kernels", "jaxllm.models": "models", "jaxllm": "jaxllm"}
STOREYS = {"pallas_kernels": 0, "jaxllm.models": 1, "jaxllm": 2}


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def storey(module: str) -> int:
    return next(STOREYS[name] for name in sorted(STOREYS, key=len, reverse=True) if f"{module}.".startswith(f"{name}."))


def imports(module: str, deferred: bool) -> set[str]:
    """Our modules that this one imports; with `deferred`, also inside functions. Type checking alone does not count."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        if not deferred and isinstance(node, ast.FunctionDef):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} has a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found & set(MODULES)


def test_imports_go_one_way():
    for module in MODULES:
        for target in imports(module, deferred=True):
            assert storey(target) <= storey(module), f"{module} imports {target}, a storey above it"


def test_kernels_import_jax_alone():
    allowed = {"jax", "pallas_kernels", "numpy"} | set(sys.stdlib_module_names)
    for module, path in MODULES.items():
        if storey(module) == 0:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                assert {name.split(".")[0] for name in names} <= allowed, f"{module} imports {names}"


def test_no_circular_imports():
    graph = {module: imports(module, deferred=True) - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scheduling_needs_no_jax():
    run(
        "import sys; sys.modules['jax'] = None; sys.modules['jaxlib'] = None\n"
        "import jaxllm.scheduling as s, numpy as np\n"
        "scheduler = s.Scheduler(s.SchedulerConfig(8, 4, 2, 8, 16))\n"
        "scheduler.add(s.Request('a', np.arange(3, dtype=np.int32), 2))\n"
        "assert str(scheduler.schedule(0.0)) == 'step 1: a+3'"
    )


def test_nothing_that_users_import_imports_torch():
    out = run(
        "import sys; sys.modules['torch'] = None\n"
        "import jaxllm.llm, jaxllm.cli, jaxllm.loading, jaxllm.models.weights, jaxllm.models.llama; print('ok')"
    )
    assert out == "ok\n"


def test_import_is_lazy_and_light():
    heavy = run("import sys, jaxllm; print([m for m in ('jax', 'flax', 'transformers', 'numpy') if m in sys.modules])")
    assert heavy == "[]\n"

    def seconds(code: str) -> float:
        start = time.perf_counter()
        run(code)
        return time.perf_counter() - start

    pairs = [(seconds("import jaxllm"), seconds("pass")) for _ in range(5)]
    assert statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs) < 0.3


def test_public_names():
    import jaxllm

    public = {name for name in jaxllm._MODULE_OF if not name.startswith("_")}
    assert public == set(jaxllm.__all__)
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name).__doc__, f"{name} has no docstring"
    assert set(jaxllm.__all__) <= set(dir(jaxllm))
    with pytest.raises(AttributeError, match="'generat'"):
        jaxllm.generat  # noqa: B018


VLLM_NAMES = """
    LLM SamplingParams PoolingParams ModelRegistry PromptType TextPrompt TokensPrompt RequestOutput CompletionOutput
    PoolingOutput PoolingRequestOutput EmbeddingOutput EmbeddingRequestOutput ClassificationOutput
    ClassificationRequestOutput ScoringOutput ScoringRequestOutput LLMEngine AsyncLLMEngine EngineArgs AsyncEngineArgs
"""


def test_vllm_s_public_names_and_module_paths():
    import jaxllm
    from jaxllm.entrypoints.llm import LLM

    assert set(VLLM_NAMES.split()) <= set(jaxllm.__all__)
    assert LLM is jaxllm.LLM


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_file_introduces_itself(module):
    source = MODULES[module].read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
