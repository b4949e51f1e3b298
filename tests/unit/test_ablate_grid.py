"""What an ablation refuses, the jobs it makes, and what is done next."""

import copy
import shutil

import pytest
import yaml
from ablation_files import job_chain, write, write_ablation

from alpro_launch.ablate.config import AblateConfig
from alpro_launch.ablate.jobs import grid_digest, make_jobs
from alpro_launch.ablate.records import (
    Record,
    check_test_look,
    commands_text,
    note_test_look,
    only_one_in,
    read_record,
    write_record,
)
from alpro_launch.ablate.schedule import fate, left, next_job, remaining_s, states
from alpro_stream.config import load_config, validate
from alpro_stream.errors import ConfigError, ProcessError


@pytest.fixture
def tree(tmp_path):
    return write_ablation(tmp_path, tmp_path / "corpus")


def read(tree):
    return validate(AblateConfig, tree, source="grid.yaml")


def changed(tree, **changes):
    return {**copy.deepcopy(tree), **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1, 0]}, "0 is there twice"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two rows are named 'a'"),
        ({"rows": [{"name": "a b"}, {"name": "a/b"}]}, "same folder, 'a-b'"),
        ({"rows": []}, "there is no row"),
        ({"rows": [{"name": "tame", "trian": ["x=1"]}]}, "no stage is named 'trian'; there are corpus, train"),
        ({"rows": [{"name": "tame", "corpus": ["seed=1"]}]}, "changes stage corpus, which is run once"),
        ({"rows": [{"name": "tame", "train": "x=1"}]}, "rows.0.train"),
        ({"compare": {"baselines": ["best"]}}, "no row is named 'best'; there are tame, wild"),
        ({"compare": {"baselines": ["tame"], "measures": ["R@5"]}}, "no measure is named 'R@5'"),
        ({"choose": "R@1 of the test split"}, "is of stage test, which is held back"),
        ({"choose": "R@5"}, "no measure is named 'R@5'"),
        ({"measures": [{"name": "m", "stage": "train", "key": "k"}]}, "an evaluation of each row is needed: train"),
        ({"measures": [{"name": "m", "stage": "val", "key": "k"}]}, "there is none"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(tree, change, message):
    with pytest.raises(ConfigError) as error:
        read(changed(tree, **change))
    assert message in str(error.value)


def test_stages_have_an_order(tree):
    stages = list(tree["stages"].items())
    for order in ([1, 0, 2, 3], [0, 1, 3, 2]):
        with pytest.raises(ConfigError, match="those with once come first, and those with held_back last"):
            read(changed(tree, stages={stages[n][0]: stages[n][1] for n in order}))
    with pytest.raises(ConfigError, match="remove once or held_back"):
        read(changed(tree, stages={**tree["stages"], "corpus": {**stages[0][1], "held_back": True}}))


def test_all_combinations_are_rows_named_by_their_values(tree):
    grid = {"train": {"losses.pem.threshold": [0, 0.2], "losses.pem.pool": ["mean", None]}, "test": {"num_clips": [1]}}
    rows = read(changed(tree, grid=grid, rows=[{"name": "tame"}])).all_rows()
    assert [row.name for row in rows[:3]] == [
        "tame",
        "threshold=0, pool=mean, num_clips=1",
        "threshold=0, pool=null, num_clips=1",
    ]
    assert rows[1].overrides == {
        "train": ("losses.pem.threshold=0", "losses.pem.pool=mean"),
        "test": ("num_clips=1",),
    }
    assert len({row.folder for row in rows}) == len(rows) == 5
    clash = {"train": {"losses.vtc.weight": [1], "losses.pem.weight": [2]}}
    assert (
        read(changed(tree, grid=clash, rows=[], compare=None)).all_rows()[0].name
        == "losses.vtc.weight=1, losses.pem.weight=2"
    )


def test_jobs_are_commands_in_folders_of_their_own(tree):
    jobs = make_jobs(read(tree))
    assert [job.title for job in jobs[:5]] == [
        "seed 0, corpus",
        "seed 1, corpus",
        "seed 0, tame: train",
        "seed 0, tame: validation",
        "seed 0, tame: test",
    ]
    corpus, train, validation = jobs[0], jobs[2], jobs[3]
    assert len(jobs) == 2 + 2 * 2 * 3
    assert (train.after, validation.after, jobs[5].after) == (corpus, train, corpus)
    assert jobs[4].after == train, "nothing is made from the result of an evaluation"
    out = tree["out"]
    assert train.arguments[2:] == ("seed=0", f"row_dir={out}/seed0/rows/tame")
    assert str(train.output) == f"{out}/seed0/rows/tame/train"
    assert jobs[5].arguments[-1] == "train.optimizer.learning_rate=1e12"
    assert [job.held_back for job in jobs[2:5]] == [False, False, True]


def test_what_is_run_again_when_a_setting_changes(tree, tmp_path):
    before = {job.title: job.digest for job in make_jobs(read(tree))}

    def differing(other):
        return {job.title for job in make_jobs(read(other)) if job.digest != before[job.title]}

    other = changed(tree)
    other["rows"][1]["train"].append("train.max_steps=7")
    assert differing(other) == {f"seed {n}, wild: {stage}" for n in (0, 1) for stage in ("train", "validation", "test")}
    other = changed(tree)
    other["stages"]["corpus"]["overrides"] = ["num_nouns=23"]
    assert differing(other) == set(before), "everything comes after the corpus"
    assert differing(changed(tree, jobs=1, note="x")) == set()
    assert differing(changed(tree, out=str(tmp_path / "moved"))) == set(), "a folder that is moved stays what it is"
    assert differing(changed(tree, seeds=[1])) == set()


@pytest.mark.parametrize(
    "rows",
    [
        [{"name": "a"}, {"name": "b"}],
        [{"name": "a"}, {"name": "b", "train": ["train.max_steps=6"]}],
        [{"name": "a"}, {"name": "b", "train": ["train.log_every=1"]}],  # which is the default, and not in the file
        [
            {"name": "a", "train": ["train.max_steps=5"]},
            {"name": "b", "train": ["train.max_steps=3+2", "train.max_steps=5"]},
        ],
    ],
    ids=["nothing", "as in the file", "the default", "by another way"],
)
def test_rows_that_are_one_run_are_refused(tree, rows):
    with pytest.raises(ConfigError, match="rows 'a' and 'b' have the same settings"):
        make_jobs(read(changed(tree, rows=rows, compare=None)))


def test_seeds_that_nothing_uses_are_refused(tree, tmp_path):
    text = (tmp_path / "train.yaml").read_text()
    (tmp_path / "train.yaml").write_text(text.replace("seed: ${seed}", "seed: 3").replace("seed: 0\n", ""))
    (tmp_path / "corpus.yaml").write_text((tmp_path / "corpus.yaml").read_text().replace("seed: 0", "num_nouns: 24"))
    with pytest.raises(ConfigError, match=r"seeds 0 and 1 give the same settings.*\$\{seed\}"):
        make_jobs(read(tree))


def test_a_stage_writes_inside_of_its_folder_and_nowhere_else(tree, tmp_path):
    other = changed(tree)
    other["stages"]["train"]["overrides"] = [f"run_dir={tmp_path / 'elsewhere'}"]
    with pytest.raises(ConfigError, match=r"stage train writes to .*elsewhere.*use \$\{row_dir\}"):
        make_jobs(read(other))
    other["stages"]["train"]["overrides"] = ["run_dir=${row_dir}"]
    with pytest.raises(ConfigError, match="not inside of"):
        make_jobs(read(other))
    other = changed(tree)
    del other["stages"]["test"]["overrides"]
    with pytest.raises(ConfigError, match="tame: validation and seed 0, tame: test both write to"):
        make_jobs(read(other))
    other["stages"]["test"]["overrides"] = ["out=${row_dir}/train/test"]
    with pytest.raises(ConfigError, match=r"tame: test writes to .* inside of .*/train, to which seed 0, tame: train"):
        make_jobs(read(other))


def test_misspelt_settings_are_found_before_anything_runs(tree):
    other = changed(tree, rows=[{"name": "tame", "train": ["train.max_step=3"]}], compare=None)
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        make_jobs(read(other))
    other = changed(tree)
    other["stages"]["train"]["command"] = "tarin"
    with pytest.raises(ConfigError, match=r"no stage can be `alpro tarin`; expected one of corpus, .*evaluate"):
        make_jobs(read(other))


def test_a_name_that_a_file_uses_is_no_unknown_key(tmp_path):
    path = write(tmp_path / "grid.yaml", {"place": "there", "out": "${place}/x", "stages": {}, "measures": []})
    with pytest.raises(ConfigError) as error:
        load_config(AblateConfig, path)
    assert "place" not in str(error.value)
    path = write(tmp_path / "grid.yaml", {"place": "there", "out": "x", "stages": {}, "measures": []})
    with pytest.raises(ConfigError, match="unknown key 'place'"):
        load_config(AblateConfig, path)


def test_a_changed_grid_is_refused_once_the_test_split_was_looked_at(tree, tmp_path):
    def grid(tree):
        config = read(tree)
        return grid_digest(make_jobs(config), config.choose)

    first, out = grid(tree), tmp_path / "out"
    check_test_look(out, first)
    note_test_look(out, first)
    note_test_look(out, "another")  # The first look counts.
    check_test_look(out, grid(changed(tree, jobs=1, title="x", note="y")))
    for change in ({"seeds": [0]}, {"choose": None}, {"rows": tree["rows"][:1]}):
        with pytest.raises(ConfigError, match=r"looked at on \d.*UTC; a changed grid needs a new `out`"):
            check_test_look(out, grid(changed(tree, **change)))


def chains():
    """Two rows of a train and an evaluation each, after a stage for both."""
    (shared,) = job_chain(0, "", ["corpus"])
    rows = [job_chain(0, row, ["train", "eval"]) for row in ("a", "b")]
    jobs = [shared]
    for train, evaluation in rows:
        train = train.__class__(**{**vars(train), "after": shared})
        jobs += [train, evaluation.__class__(**{**vars(evaluation), "after": train})]
    return jobs


def test_what_is_next_is_the_first_whose_needs_are_done():
    jobs = shared, train_a, eval_a, train_b, _ = chains()
    found = dict.fromkeys(jobs, "todo")
    assert next_job(jobs, found, []) is shared
    assert next_job(jobs, found, [shared]) is None
    found[shared] = "done"
    assert next_job(jobs, found, [train_a]) is train_b
    found[train_a] = "failed"
    assert next_job(jobs, found, []) is train_b, "other rows go on"
    assert next_job(jobs, found, [train_b]) is None
    assert [job.row for job in left(jobs, found)] == ["b", "b"]
    assert fate(eval_a, found) == "failed in train"
    assert fate(train_b, found) == "not run"


def test_what_is_known_from_before_counts_only_for_the_same_settings():
    jobs = shared, train_a, eval_a, train_b, eval_b = chains()
    records = {job: Record(digest=job.digest, state="done") for job in jobs}
    assert set(states(jobs, records).values()) == {"done"}
    records[train_a] = Record(digest="other", state="done")
    records[train_b] = Record(digest=train_b.digest, state="diverged")
    found = states(jobs, records)
    assert [found[job] for job in jobs] == ["done", "todo", "todo", "diverged", "todo"]
    for state in ("started", "failed"):
        assert states([shared], {shared: Record(digest=shared.digest, state=state)})[shared] == "todo"
    assert states([shared], {shared: None})[shared] == "todo"
    assert eval_a.after is train_a
    assert eval_b.after is train_b


def test_what_was_made_from_something_else_is_made_again():
    corpus, train = job_chain(0, "row", ["corpus", "train"])
    made = Record(digest=corpus.digest, state="done", made=7.0)
    for made_from, state in ((7.0, "done"), (6.0, "todo"), (0.0, "todo")):
        records = {corpus: made, train: Record(digest=train.digest, state="done", made_from=made_from)}
        assert states([corpus, train], records)[train] == state


def test_remaining_time_is_that_of_the_same_stages():
    jobs = chains()[1:]
    assert remaining_s(jobs, {"train": [10.0, 20.0], "eval": [4.0]}, 2) == (19.0, False)
    assert remaining_s(jobs, {"train": [10.0, 20.0]}, 2) == (15.0, True)
    assert remaining_s(jobs[:1], {"train": [10.0]}, 8) == (10.0, False)
    assert remaining_s([], {}, 2) == (0.0, False)


def test_a_record_counts_while_what_it_is_of_is_there(tree):
    job = make_jobs(read(tree))[0]
    job.output.mkdir(parents=True)
    write_record(job, Record(digest="d", state="done", seconds=2.0))
    assert read_record(job) == Record(digest="d", state="done", seconds=2.0)
    shutil.rmtree(job.output)
    assert read_record(job) is None
    failed = Record(digest="d", state="failed", status=69)
    write_record(job, failed)
    assert read_record(job) == failed, "it may have failed before it wrote anything"
    job.output.mkdir()
    job.record.write_text('{"digest": "d", "st')
    with pytest.raises(ConfigError, match=r"is damaged.*remove it"):
        read_record(job)


def test_only_one_is_at_work_in_a_folder(tmp_path):
    said = []
    with (
        only_one_in(tmp_path, said.append),
        pytest.raises(ProcessError, match="another `alpro ablate` is at work"),
        only_one_in(tmp_path, said.append, wait_s=0.3),
    ):
        pass
    assert len(said) == 1
    with only_one_in(tmp_path, said.append, wait_s=0):
        pass


def test_a_command_line_can_be_given_by_hand():
    assert commands_text(["train", "a.yaml", "x=[1, 2]", "y=1"]) == "alpro train a.yaml 'x=[1, 2]' y=1"


def test_the_grid_itself_is_read_as_other_files_are(tree, tmp_path):
    path = write(tmp_path / "grid.yaml", tree)
    assert load_config(AblateConfig, path, ["seeds=[4]", "jobs=3"]).seeds == (4,)
    assert yaml.safe_load(path.read_text())["seeds"] == [0, 1]
