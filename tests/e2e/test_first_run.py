"""What a newcomer does by following the README: three clips of one's own, sharded, trained and searched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alpro_launch import train as train_entry
from alpro_launch.cli import main as alpro
from alpro_stream.exit_status import CONFIGURATION, DATA

CLIPS = Path("examples/clips")
SMALL = ["stream.global_batch=3", "stream.num_lanes=1", "train.max_steps=3", "train.checkpoint_every=2"]
HOSTILE = '<script>alert("caption")</script> a dog'


def run_alpro(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alpro_launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after sharding and both trainings."""
    root = tmp_path_factory.mktemp("newcomer")
    rows = [json.loads(line) for line in (CLIPS / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "video"][:3]
    for row in rows:
        shutil.copy(CLIPS / row["media"], root / Path(row["media"]).name)
        row["media"] = Path(row["media"]).name
    rows[0]["captions"][0] = HOSTILE
    (root / "broken.mp4").write_bytes(b"this is no video")
    rows.append({"id": "broken", "media": "broken.mp4", "captions": ["nobody sees this"]})
    rows.append({"id": "mute", "media": rows[0]["media"], "captions": []})
    manifest = root / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    own = [f"work_dir={root / 'run'}"]

    shard = run_alpro("shard", "configs/demo/shard.yaml", f"manifest={manifest}", *own)
    assert shard.returncode == 0, shard.stderr
    train = run_alpro("train", "configs/demo/prompter.yaml", "configs/demo/pretrain.yaml", *own, *SMALL)
    assert train.returncode == 0, train.stderr
    return root / "run"


def test_bad_rows_are_counted_with_their_reasons_and_stop_nothing(work: Path):
    failures = [json.loads(line) for line in (work / "shards/failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["broken", "mute"]
    assert "caption" in failures[1]["reason"]


def test_metrics_have_all_four_losses_of_every_step(work: Path):
    lines = [json.loads(line) for line in (work / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss/vtc", "loss/vtm", "loss/mlm", "loss/pem", "clips_per_s"} <= lines[0].keys()
    assert (work / "pretrain/checkpoints/step-000003/COMPLETE").is_file()


def test_training_again_has_nothing_to_do(work: Path, capsys: pytest.CaptureFixture[str]):
    assert train_entry.main(["configs/demo/pretrain.yaml", f"work_dir={work}", *SMALL]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_evaluation_and_page(work: Path, capsys: pytest.CaptureFixture[str]):
    assert alpro(["evaluate", "configs/demo/evaluate.yaml", f"work_dir={work}"]) == 0
    assert "chance" in capsys.readouterr().out
    result = json.loads((work / "evaluation/result.json").read_text())
    assert result["metrics"].keys() == {"vtc", "vtm"}
    assert result["metrics"]["vtm"]["text_to_video"]["num_candidates"] == 3
    assert result["chance"]["recall_at_1"] == pytest.approx(100 / 3)

    from alpro_launch.demo import load_stages
    from alpro_launch.run_page import write_run_page

    page = work / "report.html"
    stages = load_stages(str(work), SMALL)
    write_run_page(page, stages, title="t", summary="s", note="n", seconds={"Sharding": 1.0}, commands=[])
    html = page.read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "broken" in html


def test_inspect_tells_the_committed_step_and_verifies_digests(work: Path, capsys: pytest.CaptureFixture[str]):
    assert alpro(["inspect", str(work / "pretrain")]) == 0
    assert json.loads(capsys.readouterr().out)["cursor"] == {"step": 3, "skipped": []}
    assert alpro(["inspect", "--verify", str(work / "shards/train")]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stream.golbal_batch=3"], "did you mean 'global_batch'"),
        (["stream.global_batch=6"], "the largest batch that fits is stream.global_batch=3"),
        (["stream.text.tokenizer=no/such/folder"], "no tokenizer at 'no/such/folder'"),
        (["stream.sources=[{path: nowhere}]"], "no such shard folder: nowhere"),
        (["prompter.checkpoint=nowhere"], "nowhere does not exist"),
        (["stream.seed=7"], "seed: 42 != 7"),
        (["model.video.depth=2"], "depth: 3 != 2"),
        (["train.engine.num_micro_batches=2"], "does not divide the 1 lanes"),
        (["model.video.image_size=100"], "image_size"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(
    work: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
):
    arguments = ["configs/demo/pretrain.yaml", f"work_dir={work}", *SMALL, *overrides]
    assert train_entry.main(arguments) == (DATA if "shard folder" in message else CONFIGURATION)
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1


def test_an_empty_folder_in_place_of_shards(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = f"stream.sources=[{{path: {tmp_path}}}]"
    assert train_entry.main(["configs/demo/pretrain.yaml", f"work_dir={work}", *SMALL, source]) == DATA
    assert f"{tmp_path} is empty; expected shards" in capsys.readouterr().err
