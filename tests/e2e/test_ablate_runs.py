"""A tiny ablation for real: killed in the middle, with a run that diverges and one that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ablation_files import write, write_ablation
from page_files import Page

from alpro_launch.ablate.config import AblateConfig
from alpro_launch.ablate.jobs import make_jobs
from alpro_launch.ablate.records import only_one_in, read_record
from alpro_launch.ablate.runner import Runner
from alpro_launch.ablate.schedule import states
from alpro_launch.cli import main as alpro
from alpro_stream.config import validate
from alpro_stream.exit_status import CONFIGURATION, INTERRUPTED, PREEMPTED
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.metrics import read_metrics

STEPS = 60


def start(grid, errors=subprocess.PIPE):
    # A process group of its own, as a terminal makes one.
    command = [sys.executable, "-m", "alpro_launch.cli", "ablate", str(grid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)


def wait_until(condition, process):
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive_with(text):
    """Processes, this one aside, on whose command line a text stands."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or ()
        if process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE and text in " ".join(words):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """A finished ablation of two rows that was killed once; the corpus of its second seed cannot be written."""
    root = tmp_path_factory.mktemp("ablation")
    tree = write_ablation(root, write_corpus(root / "shards"), max_steps=STEPS)
    grid, out = write(root / "grid.yaml", tree), root / "out"
    (out / "seed1").mkdir(parents=True)
    (out / "seed1/corpus").write_text("in the way")
    run = out / "seed0/rows/tame/train"

    errors = root / "first.txt"
    with errors.open("w") as file:
        process = start(grid, file)
    # What is recorded is told a moment later.
    wait_until(lambda: len(read_metrics(run)) >= 3 and "cannot be used: " in errors.read_text(), process)
    at_once = len(list(out.glob("seed?/rows/*/stages/train.json")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 100
    while alive_with(str(out)):  # The kernel asks its children to end, and they save.
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = read_metrics(run)

    process = start(grid)
    text, said = process.communicate(timeout=280)
    return {
        "grid": grid,
        "out": out,
        "run": run,
        "at_once": at_once,
        "before": before,
        "text": text,
        "said": said,
        "said_first": errors.read_text(),
        "status": process.returncode,
    }


def test_what_was_killed_goes_on_and_is_not_begun_again(ablation):
    assert ablation["at_once"] == 2, "two rows were trained at the same time"
    after, before = read_metrics(ablation["run"]), ablation["before"]
    assert [line["step"] for line in after] == list(range(1, STEPS + 1))
    assert 3 <= len(before) < STEPS
    assert after[: len(before)] == before, "steps of the first sitting are those of the second"
    assert "is removed" not in ablation["said"]
    assert alive_with(str(ablation["out"])) == []


def test_the_table_tells_what_diverged_and_what_failed(ablation):
    assert ablation["status"] == CONFIGURATION, "of the stage that failed"
    result = json.loads((ablation["out"] / "ablation.json").read_text())
    tame, wild = (result["cells"][row]["R@1"] for row in ("tame", "wild"))
    evaluation = json.loads((ablation["out"] / "seed0/rows/tame/validation/result.json").read_text())
    assert tame["values"] == {"0": evaluation["metrics"]["vtc"]["text_to_video"]["recall_at_1"]}
    assert tame["missing"] == {"1": "failed in corpus"}
    assert wild["missing"] == {"0": "diverged in train", "1": "failed in corpus"}
    assert [measure["name"] for measure in result["measures"]] == ["R@1"], "the test split was not looked at"
    assert "1 of 2 seeds: seed 1 failed in corpus" in ablation["text"]
    assert (ablation["out"] / "ablation.md").read_text() in ablation["text"]
    assert "diverged in train" in " ".join(Page((ablation["out"] / "page.html").read_text()).text)
    assert not list(ablation["out"].glob("seed?/rows/*/test"))


def test_each_stage_has_its_lines_and_a_failure_its_last_words(ablation):
    said = ablation["said"]
    assert said.count("done   seed 0, tame: validation in ") == 1
    assert re.search(r"; \d left", said)
    diverged = ablation["said_first"] + said
    assert diverged.count("diverged seed 0, wild: train in ") == 1, "it is not tried again"
    assert "status 65" in diverged
    assert "cannot be used: " in diverged
    assert "failed seed 1, corpus in " in said
    (failure,) = [line for line in said.splitlines() if "seed1/corpus" in line and line.startswith("    | ")]
    assert "error: " in failure


def test_done_again_there_is_nothing_to_do(ablation, capsys):
    records = {path: path.read_bytes() for path in ablation["out"].glob("seed0/**/stages/*.json")}
    assert len(records) == 1 + 2 + 1
    assert alpro(["ablate", str(ablation["grid"]), "seeds=[0]"]) == 0
    shown = capsys.readouterr()
    assert "start" not in shown.err
    assert "0 of 1 seeds: seed 0 diverged in train" in shown.out
    assert {path: path.read_bytes() for path in records} == records


def test_the_test_split_is_looked_at_once(ablation, capsys):
    grid = ["ablate", str(ablation["grid"])]
    assert alpro([*grid, "--test"]) == CONFIGURATION
    assert "the test split is not looked at: 1 stages failed" in capsys.readouterr().err
    assert not (ablation["out"] / "test.json").exists()

    assert alpro([*grid, "seeds=[0]", "--test"]) == 0
    shown = capsys.readouterr()
    assert "R@1 of the test split" in shown.out
    assert shown.err.count(" start ") == 1, "of the row that did not diverge"
    assert alpro([*grid, "seeds=[0]", "--table"]) == 0
    assert "R@1 of the test split" in capsys.readouterr().out

    assert alpro([*grid, "seeds=[0,1]"]) == CONFIGURATION
    shown = capsys.readouterr().err
    assert "the test split was looked at on " in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, PREEMPTED), pytest.param(signal.SIGINT, INTERRUPTED, marks=pytest.mark.slow)],
)
def test_a_request_to_end_ends_what_was_started(tmp_path, number, status):
    tree = write_ablation(tmp_path, tmp_path / "shards")
    tree["stages"]["corpus"]["overrides"] = ["num_clips={train: 3000, validation: 4, test: 4}"]
    out = Path(tree["out"])
    process = start(write(tmp_path / "grid.yaml", tree))
    wait_until(lambda: len(list(out.glob("seed?/corpus/**/*.mp4"))) > 1, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "seed 0, corpus, to go on later" in said
    assert "the same command goes on" in said
    assert alive_with(str(out)) == []
    assert [json.loads(path.read_text())["state"] for path in out.glob("seed?/stages/*.json")] == ["started"] * 2


def test_a_changed_setting_runs_again_what_depends_on_it(tmp_path):
    tree = write_ablation(tmp_path, tmp_path / "shards")
    said: list[str] = []

    def make_corpora():
        config = validate(AblateConfig, tree, source="grid.yaml")
        jobs = make_jobs(config)[:2]
        found = states(jobs, {job: read_record(job) for job in jobs})
        with only_one_in(config.out, said.append) as lock:
            assert Runner(jobs, found, {}, 1, lock, said.append, lambda _: None).run() == 0
        assert [found[job] for job in jobs] == ["done", "done"]
        return jobs[0].output

    corpus = make_corpora()
    first = (corpus / "manifest.jsonl").read_bytes()
    (corpus / "left over").touch()
    make_corpora()
    assert [line for line in said if "start" in line] == [f"[{n + 1}/2] start  seed {n}, corpus" for n in (0, 1)]
    assert re.fullmatch(r"\[1/2\] done   seed 0, corpus in [\d.]+ s; 1 left, about [\d.]+ s", said[1])
    assert (corpus / "left over").exists()

    tree["stages"]["corpus"]["overrides"] = ["num_nouns=20"]
    make_corpora()
    assert f"seed 0, corpus: its settings changed, {corpus} is removed" in said
    assert (corpus / "manifest.jsonl").read_bytes() != first
    assert not (corpus / "left over").exists()
