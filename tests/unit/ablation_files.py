"""Ablations for tests: the files of tiny ones, and jobs that are made up."""

from pathlib import Path

import yaml

from alpro_launch.ablate.jobs import Job
from alpro_stream.testing.configs import tiny_run

R1 = "metrics.vtc.text_to_video.recall_at_1"


def job_chain(seed, row, stages, held_back=()):
    """A job for each stage, each after the one before."""
    jobs = []
    for stage in stages:
        folder = Path("out") / f"seed{seed}" / row
        before = jobs[-1] if jobs else None
        job = Job(
            seed, row, stage, ("train",), folder, folder / stage, f"{seed}{row}{stage}", before, stage in held_back
        )
        jobs.append(job)
    return jobs


def write_ablation(root, corpus, max_steps=6):
    """Writes the files of a tiny ablation into a folder; returns the grid as a plain tree.

    Its rows are `tame`, and `wild`, whose loss is no number after a step or two.
    """
    run = tiny_run(corpus, root, {"train.max_steps": max_steps, "train.checkpoint_every": 5, "stream.seed": "${seed}"})
    write(root / "corpus.yaml", {"seed": 0, "work_dir": "w", "out": "${work_dir}/corpus", "num_clips": NUM_CLIPS})
    write(root / "train.yaml", {"seed": 0, "row_dir": "r", **run, "run_dir": "${row_dir}/train"})
    evaluation = {
        "row_dir": "r",
        "split": "validation",
        "checkpoint": "${row_dir}/train",
        "sources": [{"path": str(corpus / "train"), "kind": "video"}],
        "scores": ["vtc"],
        "out": "${row_dir}/${split}",
    }
    write(root / "evaluate.yaml", evaluation)
    evaluate = {"command": "evaluate", "config": str(root / "evaluate.yaml")}
    return {
        "out": str(root / "out"),
        "seeds": [0, 1],
        "jobs": 2,
        "stages": {
            "corpus": {"command": "corpus", "config": str(root / "corpus.yaml"), "once": "seed"},
            "train": {"command": "train", "config": str(root / "train.yaml")},
            "validation": evaluate,
            "test": {**evaluate, "overrides": ["split=test"], "held_back": True},
        },
        "rows": [{"name": "tame"}, {"name": "wild", "train": ["train.optimizer.learning_rate=1e12"]}],
        "measures": [
            {"name": "R@1", "stage": "validation", "key": R1, "unit": "%"},
            {"name": "R@1 of the test split", "stage": "test", "key": R1, "unit": "%"},
        ],
        "choose": "R@1",
        "compare": {"baselines": ["tame"]},
    }


NUM_CLIPS = {"train": 8, "validation": 4, "test": 4}


def write(path, tree):
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
