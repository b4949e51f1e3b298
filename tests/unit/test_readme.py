import re
from pathlib import Path

import pytest
import yaml

from alpro_stream.errors import ConfigError
from alpro_stream.stream.config import StreamConfig
from benchmarks import readme


def test_the_table_of_results_is_that_of_the_committed_files():
    for path, text in readme.current().items():
        assert path.read_text(encoding="utf-8") == text, f"run benchmarks/readme.py for {path}"


def test_a_result_that_is_missing_is_named(tmp_path):
    for name in readme.NEEDED:
        if name != "stream":
            (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"stream\.json: missing; `alpro bench stream --json .*stream\.json`"):
        readme.load_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"benchmark": "plan", "machine": {}, "quick": true, "rows": []}',
            "with --quick, .* bench plan again",
        ),
        ('{"benchmark": "plan"}', "holds no results of a benchmark"),
        ("[]", "holds no results of a benchmark"),
        ('{"benchmark": ', "holds no results: "),
    ],
)
def test_results_that_cannot_be_used_are_refused(tmp_path, text, says):
    for name in readme.NEEDED:
        (tmp_path / f"{name}.json").write_text((readme.RESULTS / f"{name}.json").read_text())
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"plan\.json .*{says}"):
        readme.load_results(tmp_path)


def test_what_has_no_target_is_said_with_its_result():
    found = dict(readme.load_results(readme.RESULTS))
    hidden = readme.untargeted(found)
    assert "Labels hidden behind the step" in hidden
    assert "prompter.json" in hidden
    rows = [{"name": f"{readme.INDEX}: {what}", "value": value} for what, value in (("size", 0.9), ("parsing", 20.0))]
    found["plan"] = {"rows": rows}
    assert "index of 23,000 members**: 0.9 MB, parsed in 20 ms" in readme.untargeted(found)


def test_every_file_the_documents_link_to_exists():
    for document in (Path("README.md"), Path("benchmarks/README.md"), *Path("docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document} links to {target}"


def test_the_tree_in_the_readme_names_every_folder():
    text = Path("README.md").read_text(encoding="utf-8")
    for folder in [*Path("alpro_stream").iterdir(), Path("sharding/alpro_sharding"), Path("launch/alpro_launch")]:
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in text


@pytest.mark.parametrize(
    "question",
    [
        "Did my run continue from exactly where it stopped?",
        "Why is the GPU waiting?",
        "Which videos were dropped, and why?",
    ],
)
def test_the_questions_of_new_users_are_answered_by_name(question):
    for document in ("README.md", "docs/streaming.md"):
        assert question in Path(document).read_text(encoding="utf-8")


def test_the_defaults_of_the_stream_are_those_in_its_tables():
    text = "".join(Path("docs", name).read_text(encoding="utf-8") for name in ("streaming.md", "decoding.md"))
    rows = re.findall(r"^\| `stream\.([\w.]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    settings = StreamConfig(sources=[{"path": "x"}], text={"tokenizer": "x"})
    assert len(rows) > 20
    for name, default in rows:
        value = settings
        for part in name.split("."):
            value = getattr(value, part)
        assert value == yaml.safe_load(default), name


def test_every_link_to_a_part_of_a_document_leads_there():
    for document in (Path("README.md"), *Path("docs").glob("*.md")):
        for target, part in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
            text = (document.parent / target if target else document).read_text(encoding="utf-8")
            titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
            assert part in [title.replace(" ", "-") for title in titles], f"{document} links to {target}#{part}"
