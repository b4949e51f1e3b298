import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files in the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(Path.cwd())).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        return wheel.namelist()


def test_wheel_claims_only_the_projects_own_names(names: list[str]):
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"alpro_stream", "alpro_sharding", "alpro_launch"}


def test_wheel_brings_configs_templates_and_types(names: list[str]):
    configs = {str(path) for path in Path("configs").rglob("*.yaml")}
    assert {f"alpro_launch/{config}" for config in configs} <= set(names)
    assert any(name.startswith("alpro_stream/pages/templates/") for name in names)
    assert {f"{package}/py.typed" for package in ("alpro_stream", "alpro_sharding", "alpro_launch")} <= set(names)


def test_wheel_carries_licence_and_notice(names: list[str]):
    licences = {name.rsplit("/", 1)[-1] for name in names if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE"} <= licences
