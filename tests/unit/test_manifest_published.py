import json

import pytest

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import ManifestConfig, ManifestRow, RejectedRow, read_manifest


def read(tmp_path, content, format_, name="annotations.json", **config):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return list(read_manifest(path, ManifestConfig(format=format_, **config)))


def lines_of(*objects):
    return "\n".join(json.dumps(values) for values in objects)


def row(row_id, media, captions, line, qa=(), split="train", kind="video"):
    return ManifestRow(row_id, media, tuple(captions), tuple(qa), None, None, split, kind, line)


def test_cc3m(tmp_path):
    text = 'a very "typical" bus station\thttp://x/a.jpg\nsierra looked stunning\thttps://x/get?id=2\nno tab\n'
    first, second, third = read(tmp_path, text, "cc3m", "Train-GCC-training.tsv")
    assert first == row("1", "http://x/a.jpg", ['a very "typical" bus station'], 1, kind="image")
    assert second == row("2", "https://x/get?id=2", ["sierra looked stunning"], 2, kind="image")
    assert third == RejectedRow(3, None, "1 columns, expected a caption and an address with a tab between")
    local, *_ = read(tmp_path, text, "cc3m", columns={"id": "cc{line}", "media": "images/{line}.jpg"})
    assert (local.id, local.media) == ("cc1", "images/1.jpg")


MSRVTT = {
    "info": {"contributor": "x"},
    "videos": [
        {"category": 9, "url": "https://y/w?v=1", "video_id": "video0", "start time": 137.72, "end time": 149.44,
         "split": "train", "id": 0},
        {"video_id": "video1", "split": "validate", "id": 1},
        {"video_id": "video2", "split": "test", "id": 2},
        {"split": "test", "id": 3},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video1", "sen_id": 0},
        {"caption": "a man sings", "video_id": "video0", "sen_id": 1},
        {"caption": "a car drives", "video_id": "video1", "sen_id": 2},
        {"caption": "lost", "video_id": "video9", "sen_id": 3},
        "no object",
    ],
}  # fmt: skip


def test_msrvtt(tmp_path):
    assert read(tmp_path, MSRVTT, "msrvtt", "train_val_videodatainfo.json") == [
        RejectedRow(5, None, "sentence 5 names no 'video_id'"),
        row("video0", "video0.mp4", ["a man sings"], 1),
        row("video1", "video1.mp4", ["a car is shown", "a car drives"], 2, split="val"),
        RejectedRow(3, "video2", "no caption: 'captions' needs at least one text"),
        RejectedRow(4, None, "video 4 has no 'video_id'"),
        RejectedRow(4, "video9", "sentence 4 is of a video that the list does not have"),
    ]


def test_msrvtt_by_the_original_addresses_and_with_another_split(tmp_path):
    (tmp_path / "1k-a.txt").write_text("video1\n")
    columns = {"media": "url", "start_s": "start time", "end_s": "end time"}
    rows = read(tmp_path, MSRVTT, "msrvtt", columns=columns, splits={"test": str(tmp_path / "1k-a.txt")})
    by_id = {row.id: row for row in rows}
    first = by_id["video0"]
    assert (first.media, first.start_s, first.end_s, first.split) == ("https://y/w?v=1", 137.72, 149.44, "train")
    assert by_id["video1"] == RejectedRow(2, "video1", "no 'media'")
    (video1,) = [row for row in read(tmp_path, MSRVTT, "msrvtt", splits={"test": str(tmp_path / "1k-a.txt")})
                 if row.id == "video1"]  # fmt: skip
    assert video1.split == "test"


def test_didemo_makes_a_paragraph_of_a_video(tmp_path):
    moments = [
        {
            "annotation_id": 1,
            "description": "a dog comes",
            "video": "1@N00_2.avi",
            "times": [[0, 0]],
            "num_segments": 6,
        },
        {"annotation_id": 2, "description": "sky", "video": "b.mov", "times": [[1, 1]]},
        {"annotation_id": 3, "description": "it leaves.", "video": "1@N00_2.avi", "times": [[4, 5]]},
        {"annotation_id": 4, "video": "b.mov"},
        {"annotation_id": 5, "description": "nowhere"},
    ]
    assert read(tmp_path, moments, "didemo", "train_data.json", split="val") == [
        RejectedRow(4, "b.mov", "expected a 'video' and its 'description'"),
        RejectedRow(5, None, "expected a 'video' and its 'description'"),
        row("1@N00_2.avi", "1@N00_2.avi", ["a dog comes it leaves."], 1, split="val"),
        row("b.mov", "b.mov", ["sky"], 2, split="val"),
    ]


def test_msvd_collects_the_captions_of_a_clip(tmp_path):
    text = (
        b"# Each line is in the format:\n#VideoID_Start_End Description\n\n"
        b"-4wsuPCjDBc_5_15 a squirrel is eating a peanut\n"
        b"-7KMZQEsJW4_205_208 a man is singing\n"
        b"-4wsuPCjDBc_5_15 a squirrel eats\n"
        b"-lonely_1_2\n"
        b"-bad_1_2 caf\xe9\n"
        b"-4wsuPCjDBc_5_15 a squirrel eats\r\n"
    )
    (tmp_path / "test.txt").write_text("-7KMZQEsJW4_205_208\n")
    captions = ["a squirrel is eating a peanut", "a squirrel eats", "a squirrel eats"]
    rows = read(tmp_path, text, "msvd", "AllVideoDescriptions.txt", splits={"test": str(tmp_path / "test.txt")})
    assert rows == [
        row("-4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15.avi", captions, 4),
        row("-7KMZQEsJW4_205_208", "-7KMZQEsJW4_205_208.avi", ["a man is singing"], 5, split="test"),
        RejectedRow(7, "-lonely_1_2", "no caption: 'captions' needs at least one text"),
        RejectedRow(8, None, "not UTF-8 (byte 12 of the line)"),
    ]


def test_alpro_retrieval(tmp_path):
    text = lines_of(
        {"clip_name": "video7010", "caption": "a girl sings", "retrieval_key": "ret0"},
        {"clip_name": "video7011", "caption": "a boy runs"},
        {"clip_name": "video7010", "caption": "someone sings"},
        {"clip_name": "video7012"},
    )
    assert read(tmp_path, text, "alpro", "train.jsonl") == [
        row("video7010", "video7010.mp4", ["a girl sings", "someone sings"], 1),
        row("video7011", "video7011.mp4", ["a boy runs"], 2),
        RejectedRow(4, "video7012", "no caption: 'captions' needs at least one text"),
    ]


def test_alpro_question_answering(tmp_path):
    text = lines_of(
        {"answer": "couch", "question": "what do they sit on?", "video_id": "video6513", "answer_type": "what"},
        {"answer": 3, "question": "how many sit?", "video_id": "video6513", "answer_type": "how"},
        {"question": "who?", "video_id": "video6514"},
    )
    questions = ["what do they sit on?", "how many sit?"]
    assert read(tmp_path, text, "alpro", columns={"media": "{video_id}.avi"}) == [
        row("video6513", "video6513.avi", questions, 1, qa=zip(questions, ["couch", "3"], strict=True)),
        RejectedRow(3, "video6514", "'answer' holds None; expected a text"),
    ]


@pytest.mark.parametrize("as_list", [True, False])
def test_alpro_pretraining(tmp_path, as_list):
    entries = [{"image": "/cc3m/1.jpg", "caption": ["a bus", "a red bus"]}, {"video": "v/1.webm", "caption": "a dog"}]
    rows = read(tmp_path, entries if as_list else lines_of(*entries), "alpro", "cc3m.txt")
    assert rows == [
        row("/cc3m/1.jpg", "/cc3m/1.jpg", ["a bus", "a red bus"], 1, kind="image"),
        row("v/1.webm", "v/1.webm", ["a dog"], 2),
    ]


def test_lavis(tmp_path):
    entries = [
        {"video": "video2960.mp4", "caption": "a cartoon", "image_id": "v2960", "instance_id": "0"},
        {"video": "video2960.mp4", "caption": "a squid", "image_id": "v2960"},
        {"image": "val/1.jpg", "caption": ["a bowl", "food"], "image_id": 1},
        "no object",
        {"video": "video0.mp4", "question": "who?", "answer": ["man", "man", "person"], "question_id": 4},
    ]
    assert read(tmp_path, entries, "lavis") == [
        row("video2960.mp4", "video2960.mp4", ["a cartoon", "a squid"], 1),
        row("val/1.jpg", "val/1.jpg", ["a bowl", "food"], 3, kind="image"),
        RejectedRow(4, None, "expected a JSON object, found a text"),
        row("video0.mp4", "video0.mp4", ["who?"], 5, qa=[("who?", "man"), ("who?", "person")]),
    ]
    by_image_id = read(tmp_path, entries[:2], "lavis", columns={"id": "image_id"})
    assert [row.id for row in by_image_id] == ["v2960"]


@pytest.mark.parametrize(
    ("format_", "content", "message"),
    [
        ("msrvtt", "[]", "holds a list; expected an object with the lists 'videos' and 'sentences'"),
        ("msrvtt", '{"videos": []}', r"holds \['videos'\]"),
        ("msrvtt", '{"videos": [', "is not JSON: .* is it complete"),
        ("didemo", "{}", "holds an object; expected a list"),
        ("didemo", b"[\xff]", r"is not UTF-8 \(byte 1\)"),
        ("lavis", '[{"video": "a"},\n {', "is not JSON: .* at line 2, character 3"),
        ("alpro", "[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_whole_is_an_error(tmp_path, format_, content, message):
    with pytest.raises(ManifestError, match=message):
        read(tmp_path, content, format_)


def test_one_clip_with_very_many_captions_takes_no_time(tmp_path):
    text = "".join(f"name_1_2 caption {number}\n" for number in range(30_000))
    (only,) = read(tmp_path, text, "msvd")
    assert len(only.captions) == 30_000


def test_msrvtt_qa_collects_the_questions_of_a_clip(tmp_path):
    entries = [
        {"answer": "couch", "category_id": 3, "id": 0, "question": "what do they sit on?", "video_id": 6513},
        {"answer": "man", "category_id": 8, "id": 1, "question": "who sings?", "video_id": 6514},
        {"answer": "two", "category_id": 3, "id": 2, "question": "how many sit?", "video_id": 6513},
        {"answer": "dog", "category_id": 3, "id": 3, "question": " ", "video_id": 6513},
        {"answer": "", "category_id": 3, "id": 4, "question": "where?", "video_id": 6514},
        {"answer": "lost", "id": 5, "question": "which video?"},
        "no object",
    ]
    questions = ["what do they sit on?", "how many sit?"]
    assert read(tmp_path, entries, "msrvtt_qa", "train_qa.json") == [
        row("video6513", "video6513.mp4", questions, 1, qa=zip(questions, ["couch", "two"], strict=True)),
        row("video6514", "video6514.mp4", ["who sings?"], 2, qa=[("who sings?", "man")]),
        RejectedRow(4, "video6513", "'qa' holds an empty question or answer"),
        RejectedRow(5, "video6514", "'answer' holds None; expected a text"),
        RejectedRow(6, None, "'id' is made of 'video{video_id}', where 'video_id' is None"),
        RejectedRow(7, None, "expected a JSON object, found a text"),
    ]


MSVD_QA = [
    {"answer": "peanut", "id": 0, "question": "what does a squirrel eat?", "video_id": 1},
    {"answer": "man", "id": 1, "question": "who sings?", "video_id": 2},
    {"answer": "squirrel", "id": 2, "question": "who eats?", "video_id": 1},
]


def test_msvd_qa_names_clips_by_the_file_beside_it(tmp_path):
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\nbroken\n")
    questions = ["what does a squirrel eat?", "who eats?"]
    name = "-4wsuPCjDBc_5_15"
    assert read(tmp_path, MSVD_QA, "msvd_qa", "train_qa.json") == [
        row(name, f"{name}.avi", questions, 1, qa=zip(questions, ["peanut", "squirrel"], strict=True)),
        RejectedRow(2, "vid2", "youtube_mapping.txt has no clip vid2"),
    ]


def test_msvd_qa_without_that_file_keeps_the_numbers(tmp_path):
    assert [(row.id, row.media) for row in read(tmp_path, MSVD_QA, "msvd_qa")] == [
        ("vid1", "vid1.avi"),
        ("vid2", "vid2.avi"),
    ]


def test_an_id_in_two_splits_is_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"video{name}\nvideo6513\n")
    splits = {name: str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    with pytest.raises(ManifestError, match=r"test.txt, line 2: 'video6513' is in the list of 'train' too"):
        read(tmp_path, [{"video_id": 6513, "question": "who?", "answer": "man"}], "msrvtt_qa", splits=splits)
