import re
from pathlib import Path

from benchmarks import readme


def test_the_table_of_results_is_that_of_the_committed_files():
    assert Path("README.md").read_text(encoding="utf-8") == readme.current()


def test_every_file_the_documents_link_to_exists():
    for document in (Path("README.md"), Path("benchmarks/README.md"), *Path("docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document} links to {target}"


def test_the_tree_in_the_readme_names_every_folder():
    text = Path("README.md").read_text(encoding="utf-8")
    for folder in [*Path("alpro_stream").iterdir(), Path("sharding/alpro_sharding"), Path("launch/alpro_launch")]:
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in text
