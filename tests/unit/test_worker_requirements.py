"""The list of libraries that the nodes of a cluster get for sharding."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "launch/templates/requirements-sharding.txt"
PACKAGES = [ROOT / "sharding/alpro_sharding", *(ROOT / "alpro_stream" / name for name in ("media", "shards", "pages"))]
OWN = {"alpro_sharding", "alpro_stream"}
OPTIONAL = {"spacy"}  # with `entities.tagger: spacy` alone
COMES_WITH = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "yaml": "omegaconf"}
REPORT_IMPORTS = """
import json, sys
import alpro_sharding.command, alpro_sharding.worker, alpro_sharding.media_process
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {normal(each.name): str(each.specifier) for each in requirements}


def normal(name):
    return name.lower().replace("_", "-")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def sources():
    """The modules that sharding may import."""
    manifest = ROOT / "alpro_stream/manifest"
    single = [ROOT / "alpro_stream" / name for name in ("config.py", "errors.py")]
    return [*single, *(path for folder in [*PACKAGES, manifest] for path in sorted(folder.rglob("*.py")))]


def test_every_library_that_is_imported_is_listed():
    listed, distributions = pins(REQUIREMENTS), importlib.metadata.packages_distributions()
    missing = {}
    for path in sources():
        for module in set(imported_modules(path)) - OWN - OPTIONAL - set(sys.stdlib_module_names):
            names = {COMES_WITH.get(module), *map(normal, distributions.get(module, [module]))}
            if not names & set(listed):
                missing.setdefault(module, []).append(str(path.relative_to(ROOT)))
    assert missing == {}


def test_the_versions_are_the_tested_ones():
    tested = pins(ROOT / "constraints.txt")
    assert pins(REQUIREMENTS) == {name: tested.get(name) for name in pins(REQUIREMENTS)}


def test_neither_torch_nor_the_trainer_is_imported():
    result = subprocess.run([sys.executable, "-c", REPORT_IMPORTS], capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stdout))
    assert {"alpro_sharding", "av", "numpy"} <= loaded
    assert not loaded & {"torch", "torchvision", "transformers", "timm", "deepspeed", "nvidia", "tensorboard"}
