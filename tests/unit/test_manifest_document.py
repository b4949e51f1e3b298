import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from alpro_stream.config import validate
from alpro_stream.manifest import Format, ManifestConfig, ManifestRow, read_manifest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "manifests.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+)\n((?:(?!^###? ).*\n)+)", DOCUMENT, re.MULTILINE))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks(DOCUMENT, "yaml"))
def test_configurations_are_valid(text):
    validate(ManifestConfig, yaml.safe_load(text).get("reading", {}), "docs/manifests.md")


def test_every_format_is_described():
    table = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", DOCUMENT, re.MULTILINE))))
    assert set(get_args(Format)) <= table
    assert len(SECTIONS) == 12


@pytest.mark.parametrize(
    ("section", "language", "name", "media"),
    [
        ("JSON lines", "json", "m.jsonl", ["clips/a1.mp4"]),
        ("CSV, TSV, Parquet", "", "m.csv", ["https://example.org/a1.mp4"]),
        ("WebVid", "", "m.csv", ["006001_006050/21179416.mp4"]),
        ("CC3M", "", "m.tsv", ["http://example.org/a.jpg"]),
        ("MSRVTT", "json", "m.json", ["video0.mp4"]),
        ("DiDeMo", "json", "m.json", ["54322086@N00_24.avi"]),
        ("MSVD", "", "m.txt", ["-4wsuPCjDBc_5_15.avi"]),
        ("MSRVTT-QA, MSVD-QA", "json", "m.json", ["video6513.mp4"]),
        ("ALPRO", "json", "m.jsonl", ["video7010.mp4", "video6513.mp4", "/data/cc3m/1.jpg"]),
        ("LAVIS", "json", "m.json", ["video2960.mp4", "val/1.jpg", "video0.mp4"]),
    ],
)
def test_examples_are_read_as_the_document_says(tmp_path, section, language, name, media):
    example = next(block for block in blocks(SECTIONS[section], language))
    (tmp_path / name).write_text(example, encoding="utf-8")
    configs = [yaml.safe_load(text)["reading"] for text in blocks(SECTIONS[section], "yaml")]
    config = configs[0] if configs and "format" in configs[0] else {}
    config.pop("splits", None)  # files that are not here
    rows = list(read_manifest(tmp_path / name, ManifestConfig(**config)))
    assert all(isinstance(row, ManifestRow) for row in rows), rows
    assert [row.media for row in rows] == media
