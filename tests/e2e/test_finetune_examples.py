"""The tiny twins of fine-tuning, from the example clips' own captions and questions to figures, as a user runs them."""

import json
from pathlib import Path

import pytest

from alpro_launch import train as train_entry
from alpro_launch.cli import main as alpro


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the shards of the examples."""
    folder = tmp_path_factory.mktemp("examples")
    assert alpro(["shard", "configs/demo/shard.yaml", f"work_dir={folder}"]) == 0
    return folder


def finetune(work: Path, name: str, num_sources: int) -> dict:
    """Trains and evaluates, in this process to save the start of others; the result."""
    data = [f"stream.sources.{number}.path={work}/shards/train" for number in range(num_sources)]
    own = [f"work_dir={work}/tiny", f"stream.text.tokenizer={work}/shards/tokenizer"]
    assert train_entry.main([f"configs/finetune/tiny_{name}.yaml", *own, *data]) == 0
    evaluate = [f"work_dir={work}/tiny", f"sources.0.path={work}/shards/train"]
    assert alpro(["evaluate", f"configs/evaluate/tiny_{name}.yaml", *evaluate]) == 0
    return json.loads((work / f"tiny/{name}_evaluation/result.json").read_text())


def test_retrieval(work: Path, capsys: pytest.CaptureFixture[str]):
    result = finetune(work, "retrieval", 1)
    assert "53 captions, 26 clips" in capsys.readouterr().out
    # Some training on 26 clips: well before the middle, where chance would put the right one.
    assert result["metrics"]["vtc"]["text_to_video"]["mean_rank"] < 0.8 * result["chance"]["mean_rank"]


def test_question_answering(work: Path, capsys: pytest.CaptureFixture[str]):
    result = finetune(work, "qa", 2)
    assert "9 questions whose answer the model does not have" in capsys.readouterr().out
    assert result["split"]["num_by_type"] == {"what": 38, "who": 6, "how": 1, "where": 4, "when": 1, "other": 0}
    assert result["metrics"]["accuracy"] > result["chance"]["accuracy"] == 10
