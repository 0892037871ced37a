"""What users install, as a wheel and editable: all of it, and nothing that takes the name `models` from them.

Nothing is downloaded: the fresh environments see the packages of the running one, but none of its .pth files, so that
jaxllm itself is the one just installed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

MISSING = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

ROOT = Path(__file__).parents[1]
FOLDERS = {"jaxllm": "jaxllm", "models": "jaxllm/models", "pallas_kernels": "pallas_kernels"}
MODEL_FILES = sorted(path.name for path in (ROOT / "jaxllm" / "default_model").iterdir())


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "jaxllm"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, source, tmp_path_factory) -> Path:
    """A fresh virtual environment with jaxllm in it; its bin folder."""
    folder = tmp_path_factory.mktemp(request.param) / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["--editable", source]
    # The running environment's jaxllm, which this one sees too, must not be uninstalled for it.
    install = ["install", "--ignore-installed", "--no-deps", "--no-build-isolation", "--no-index"]
    run(python, "-m", "pip", *install, *what, cwd=folder)
    return folder / "bin"


@pytest.fixture
def user_folder(tmp_path) -> Path:
    """Where somebody works who has a package called models."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("whose = 'the user'\n")
    return tmp_path


def test_the_wheel_holds_every_source_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    expected |= {f"jaxllm/default_model/{name}" for name in MODEL_FILES} | {"jaxllm/py.typed"}
    expected |= {f"jaxllm/chat_templates/{path.name}" for path in (ROOT / "jaxllm" / "chat_templates").iterdir()}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_a_user_s_own_models_package_is_left_alone(environment, user_folder):
    out = run(
        environment / "python",
        "-c",
        "import models, jaxllm.models as ours, jaxllm.models.layers.rope, jaxllm.llm, pallas_kernels\n"
        "print(models.whose, ours.build.__module__, 'LlamaForCausalLM' in ours.supported_architectures())",
        cwd=user_folder,
    )
    assert out == "the user jaxllm.models.registry True\n"


def test_no_top_level_models_is_installed(environment, tmp_path):
    out = run(environment / "python", "-c", "import importlib.util as u; print(u.find_spec('models'))", cwd=tmp_path)
    assert out == "None\n"


def test_it_is_the_installed_one(environment, source, tmp_path):
    folder = Path(run(environment / "python", "-c", "import jaxllm; print(jaxllm.__path__[0])", cwd=tmp_path).strip())
    assert folder.is_relative_to(environment.parent) or folder == source / "jaxllm"
    assert not folder.is_relative_to(ROOT)


def test_the_default_model_is_inside(environment, tmp_path):
    code = "import jaxllm.loading as l; print(*sorted(path.name for path in l.DEFAULT_MODEL.iterdir()))"
    assert run(environment / "python", "-c", code, cwd=tmp_path).split() == MODEL_FILES


def test_the_command_is_installed(environment, user_folder):
    out = run(environment / "jaxllm", "--help", cwd=user_folder)
    assert "generate" in out and "chat" in out
