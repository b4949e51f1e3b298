import pytest
from pydantic import Field, model_validator

from alpro_stream.config import Config, differences, load_config, save_config, to_yaml, validate
from alpro_stream.errors import ConfigError


class Leaf(Config):
    path: str
    rate: float = Field(default=0.5, gt=0)


class Section(Config):
    low: int = 1
    high: int = 2

    @model_validator(mode="after")
    def _ordered(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Deep(Config):
    leaves: list[Leaf] | None = None


class Whole(Config):
    name: str = "a"
    leaves: tuple[Leaf, ...] = ()
    section: Section = Section()
    maybe: Leaf | None = None
    deep: Deep | None = None
    named: dict[str, Leaf] = Field(default={})

    @model_validator(mode="after")
    def _named_well(self):
        if self.name == "bad":
            raise ValueError("name is bad; take another")
        return self


@pytest.fixture
def load(tmp_path):
    def load(text="", *overrides):
        path = tmp_path / "whole.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(Whole, path, overrides)

    return load


def test_overrides_are_applied_in_order_and_typed(load):
    config = load("name: x\nsection: {low: 1}", "section.high=7", "section.high=9", "maybe.path=a=b", "maybe.rate=1e-3")
    assert config == Whole(name="x", section=Section(low=1, high=9), maybe=Leaf(path="a=b", rate=1e-3))


@pytest.mark.parametrize("key", ["leaves.1.path", "leaves[1].path"])
def test_overrides_reach_into_lists(load, key):
    config = load("leaves: [{path: a}, {path: b, rate: 2}]", f"{key}=c")
    assert config.leaves == (Leaf(path="a"), Leaf(path="c", rate=2))


def test_overrides_replace_lists_and_merge_mappings(load):
    config = load("leaves: [{path: a}]\nmaybe: {path: a, rate: 2}", "leaves=[{path: z}]", "maybe={path: q}")
    assert config.leaves == (Leaf(path="z"),)
    assert config.maybe == Leaf(path="q", rate=2)
    assert load("maybe: {path: a}", "maybe=null").maybe is None


def test_interpolations_see_the_overrides(load):
    text = "name: a\nmaybe: {path: '${name}/x'}"
    assert load(text, "name=b").maybe.path == "b/x"
    assert load(text, "maybe.path=${name}/y", "name=c").maybe.path == "c/y"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("section: {hihg: 3}", (), "unknown key 'section.hihg'; did you mean 'high'?"),
        ("leaves: [{path: a, rat: 3}]", (), "unknown key 'leaves.0.rat'; did you mean 'rate'?"),
        ("maybe: {path: a, rat: 3}", (), "unknown key 'maybe.rat'; did you mean 'rate'?"),
        ("named: {k: {path: a, rat: 3}}", (), "unknown key 'named.k.rat'; did you mean 'rate'?"),
        ("deep: {leaves: [{path: a, rat: 3}]}", (), "unknown key 'deep.leaves.0.rat'; did you mean 'rate'?"),
        ("zzz: 3", (), "unknown key 'zzz'; known keys here: deep, leaves, maybe, name, named, section"),
        ("", ("section.hihg=3",), "unknown key 'section.hihg'"),
        ("maybe: {rate: 1}", (), "'maybe.path' is required and not set"),
        ("section: {low: many}", (), "'section.low': Input should be a valid integer"),
        ("section: {low: many}", (), "(got 'many')"),
        ("name: bad", (), "whole.yaml: name is bad; take another"),
        ("section: {low: 5}", (), "section: low 5 is above high 2"),
        ("- 1", (), "expected a mapping"),
        ("3", (), "not readable as YAML"),
        ("a: [", (), "not readable as YAML"),
        ("name: a\nname: b", (), "duplicate key name"),
        ("name: ???", (), "Missing mandatory value: name, at 'name'"),
        ("name: ${nope}", (), "Interpolation key 'nope' not found, at 'name'"),
        ("name: ${name}", (), "Recursive interpolation"),
        ("", ("name",), "override 'name' is not of the form key.path=value"),
        ("", ("=1",), "override '=1' is not of the form"),
        ("", ("name=[",), "override 'name=[' cannot be applied"),
        ("leaves: [{path: a}]", ("leaves.1.path=b",), "override 'leaves.1.path=b' cannot be applied"),
        ("leaves: [{path: a}]", ("leaves.x.path=b",), "override 'leaves.x.path=b' cannot be applied"),
    ],
)
def test_what_is_wrong_is_said(load, text, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert message in str(caught.value)


def test_a_section_that_contradicts_itself_is_not_printed_whole(load):
    with pytest.raises(ConfigError) as caught:
        load("section: {low: 5}")
    assert "got" not in str(caught.value)


def test_several_problems_are_named_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("nme: a\nsection: {low: x}")
    assert "'nme'" in str(caught.value)
    assert "'section.low'" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(Whole, tmp_path / name)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x\.yaml: not readable"):
        load_config(Whole, tmp_path / "x.yaml")


def test_what_is_saved_is_read_back_with_every_default(tmp_path):
    config = Whole(name="1e-3", leaves=(Leaf(path="ä: {b}", rate=1e-5),), named={"k": Leaf(path="null")})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Whole, tmp_path / "saved.yaml") == config
    assert "high: 2" in to_yaml(config)


def test_configs_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Whole().name = "b"


def test_validate_names_its_source():
    with pytest.raises(ConfigError, match=r"^somewhere: unknown key 'x'"):
        validate(Leaf, {"path": "a", "x": 1}, "somewhere")


def test_differences_names_every_leaf():
    ours = {"seed": 1, "text": {"length": 3, "same": 0}, "gone": 1, "list": [1, 2]}
    theirs = {"seed": 2, "text": {"length": 4, "same": 0}, "new": "x", "list": [1, 3]}
    assert differences(ours, theirs) == [
        "gone: 1 != None",
        "list: [1, 2] != [1, 3]",
        "new: None != 'x'",
        "seed: 1 != 2",
        "text.length: 3 != 4",
    ]
    assert differences(ours, ours) == []
