import json
import pickle
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from alpro_sharding.entities import EntityConfig, noun_counter, noun_options, vocabulary
from alpro_sharding.lemmas import singular
from alpro_sharding.wordpiece import SPECIAL_TOKENS, save_tokenizer, train_wordpiece
from alpro_stream.errors import ConfigError, ShardError

CAPTIONS = [
    "Two dogs play on the grass",
    "A dog catches a ball next to a parked bus",
    "Buses wait in front of a glass building",
    "A woman pours water into three glasses",
]

# Plurals with their singulars; of words without a colon both are the same.
LEMMAS = """
buses:bus bus glasses:glass glass grass grasses:grass dresses:dress dress boss classes:class mattress princess waitress
men:man women:woman children:child grandchildren:grandchild firemen:fireman policemen:policeman snowmen:snowman people
mice:mouse geese:goose teeth:tooth feet:foot oxen:ox fish sheep deer cattle species series aircraft
leaves:leaf wolves:wolf knives:knife halves:half calves:calf shelves:shelf bookshelves:bookshelf loaves:loaf
thieves:thief wives:wife housewives:housewife lives:life elves:elf scarves:scarf hooves:hoof roofs:roof cliffs:cliff
waves:wave gloves:glove stoves:stove caves:cave doves:dove olives:olive sleeves:sleeve groves:grove
scissors trousers jeans pants shorts leggings sunglasses goggles binoculars pliers tongs clothes pajamas headphones
shoes:shoe canoes:canoe toes:toe potatoes:potato tomatoes:tomato heroes:hero volcanoes:volcano pianos:piano zoos:zoo
babies:baby cities:city ponies:pony cherries:cherry skies:sky skis:ski fantasies:fantasy nannies:nanny fairies:fairy
movies:movie cookies:cookie brownies:brownie selfies:selfie hoodies:hoodie ties:tie pies:pie zombies:zombie
boys:boy toys:toy monkeys:monkey keys:key trays:tray kayaks:kayak
boxes:box foxes:fox mixes:mix axes:axe crosses:cross masses:mass lenses:lens lens gases:gas gas canvas canvases:canvas
churches:church beaches:beach benches:bench sandwiches:sandwich brushes:brush ashes:ash eyelashes:eyelash
mustaches:mustache headaches:headache horses:horse houses:house nurses:nurse purses:purse vases:vase roses:rose
noses:nose hoses:hose bases:base cheese moose mousse
painting paintings:painting building buildings:building wedding ceiling rings:ring ring wings:wing king earrings:earring
swimming running bedding clothing
saw saws:saw weed seed bed shed need left felt opera spade stranger creamer eraser propeller
cactus cacti:cactus fungi:fungus octopus octopuses:octopus larvae:larva virus viruses:virus walrus hippopotamus
iris lotus tennis gymnastics athletics news chorus circus compass crossroads:crossroad stairs:stair
ski taxi sushi spaghetti kiwi bikini zucchini graffiti specimen police slice rice dice
arms:arm legs:leg hands:hand eyes:eye bees:bee trees:tree knees:knee cars:car poles:pole mules:mule grandmas:grandma
data media t-shirts:t-shirt ice-creams:ice-cream roller-skates:roller-skate
quizzes:quiz sketches:sketch lynxes:lynx kisses:kiss crevasses:crevasse posses:posse
"""


def count(captions, **options):
    return noun_counter(noun_options(EntityConfig(tagger="pattern", **options)))(captions)


@pytest.mark.parametrize("pair", LEMMAS.split())
def test_nouns_have_their_singular(pair):
    word, _, wanted = pair.partition(":")
    assert singular(word) == (wanted or word)


def test_nouns_are_counted_by_their_singular():
    counts = count(CAPTIONS)
    assert counts["dog"] == 2
    assert counts["bus"] == 2
    assert counts["glass"] == 2
    assert counts["woman"] == 1
    assert not {"dogs", "bu", "glas", "the", "two", "pours", "front"} & set(counts)


def test_vague_nouns_and_scraps_are_left_out():
    assert set(count(["A video clip of a cat", "footage in the background", "x 3 %% ab <b>", ""])) == {"cat"}


def test_a_capital_letter_changes_nothing():
    assert count(["Hands hold cups"]) == count(["hands hold cups"]) == {"hand": 1, "cup": 1}
    assert count(["a Dog near the Shelves"]) == {"dog": 1, "shelf": 1}


def test_stop_words_leave_out_singular_and_plural():
    assert set(count(["dogs sit near a cat"], stop_words=("Dog", "boat"))) == {"cat"}
    assert set(count(["dogs sit near a cat"], stop_words=("dogs",))) == {"cat"}


def test_strange_captions_are_counted_too():
    strange = ["", "/", "//", "x/NN/O", "&slash;", "\x00 \ud7ff 😀dogs", "'" * 2000, "a" * 100_000, "." * 10_000]
    assert count([*strange, "a dog's bone"]) == {"dog": 1, "bone": 1}


def test_the_vocabulary_is_ordered_by_count_then_alphabet():
    counts = {"cat": 2, "dog": 3, "bus": 2, "ant": 1}
    assert vocabulary(counts, EntityConfig(num=3)) == [("dog", 3), ("bus", 2), ("cat", 2)]


# A vocabulary from a file.


def test_words_of_a_file_are_counted_and_nothing_else(tmp_path):
    path = tmp_path / "nouns.txt"
    path.write_text("\ufeffdog\nice cream\r\n\n  Fire   Truck \nfire\ncream\nglass\nglasses\nunicorn\ndog\n")
    config = EntityConfig(file=str(path), num=2, stop_words=("dog",))
    captions = [
        "Two dogs eat ice-cream",
        "An ICE CREAM and cream",
        "fire trucks on fire; a dog's glass",
        "firetruck hotdog",
    ]
    counts = noun_counter(noun_options(config))(captions)
    assert counts == {"dog": 2, "ice cream": 2, "cream": 1, "Fire Truck": 1, "fire": 1, "glass": 1, "glasses": 1}
    assert vocabulary(dict(counts), config) == [
        ("dog", 2),
        ("ice cream", 2),
        ("Fire Truck", 1),
        ("cream", 1),
        ("fire", 1),
        ("glass", 1),
        ("glasses", 1),
        ("unicorn", 0),
    ]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "No such file"),
        (b"\n \n", "is empty"),
        (b"dog\n---\n", "holds '---'"),
        (b"dog " * 40, "expected one noun or short phrase"),
        (b"caf\xe9\n", "expected UTF-8"),
    ],
)
def test_a_file_of_nouns_that_cannot_be_used_is_named(tmp_path, contents, message):
    path = tmp_path / "nouns.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ConfigError, match=message) as caught:
        noun_options(EntityConfig(file=str(path)))
    assert str(path) in str(caught.value)


def test_another_file_is_another_plan(tmp_path):
    path = tmp_path / "nouns.txt"
    path.write_text("dog\n")
    before = noun_options(EntityConfig(file=str(path)))
    path.write_text("cat\n")
    assert noun_options(EntityConfig(file=str(path))) != before


# The tagger is decided once.


@pytest.fixture(scope="module")
def spacy_model(tmp_path_factory):
    """A pipeline that knows a few words; published models cannot be downloaded in a test."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    for word in ("dogs", "dog", "leaves", "video", "glasses"):
        ruler.add([[{"LOWER": word}]], {"POS": "NOUN"})
    ruler.add([[{"LOWER": "run"}]], {"POS": "VERB"})
    ruler.add([[{"LOWER": "london"}]], {"POS": "PROPN"})
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.to_disk(folder)
    return folder


def test_spacy_finds_nouns_but_no_names(spacy_model):
    options = noun_options(EntityConfig(tagger="spacy", spacy_model=str(spacy_model), stop_words=("glass",)))
    counts = noun_counter(options)(["Dogs run in London", "a dog under the leaves, glasses", "a video"])
    assert counts == {"dog": 2, "leaf": 1}


def test_auto_takes_spacy_only_where_its_model_is(spacy_model):
    assert noun_options(EntityConfig(spacy_model=str(spacy_model))).tagger == "spacy"
    without = noun_options(EntityConfig(spacy_model="en_no_such_model"))
    assert (without.tagger, without.spacy_model, set(without.versions)) == ("pattern", None, {"simplemma", "textblob"})


def test_auto_does_not_import_spacy_to_find_out():
    script = (
        "import sys; from alpro_sharding.entities import EntityConfig, noun_counter, noun_options;"
        "print(noun_counter(noun_options(EntityConfig(spacy_model='no')))(['a dog'])['dog'], 'spacy' in sys.modules, "
        "'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "False", "False"]


@pytest.mark.parametrize("model", ["en_no_such_model", "/no/such/folder", ""])
def test_a_wanted_model_that_is_missing_is_an_error_before_anything_starts(model):
    with pytest.raises(ConfigError, match=r"neither installed nor a folder.*tagger=pattern"):
        noun_options(EntityConfig(tagger="spacy", spacy_model=model))


def test_options_are_plain_and_travel(spacy_model):
    for config in (EntityConfig(tagger="pattern"), EntityConfig(spacy_model=str(spacy_model), stop_words=("b", "a"))):
        options = noun_options(config)
        assert pickle.loads(pickle.dumps(options)) == options
        assert json.loads(json.dumps(asdict(options)))["stop_words"] == sorted(config.stop_words)


def test_a_worker_with_another_version_refuses(spacy_model, tmp_path):
    for config in (EntityConfig(tagger="pattern"), EntityConfig(spacy_model=str(spacy_model))):
        options = noun_options(config)
        with pytest.raises(ShardError, match=r"simplemma 0\.1.*the same versions on every node"):
            noun_counter(replace(options, versions={**options.versions, "simplemma": "0.1"}))


def test_a_worker_without_the_model_or_with_another_refuses(spacy_model, tmp_path):
    options = noun_options(EntityConfig(spacy_model=str(spacy_model)))
    with pytest.raises(ShardError, match="model none"):
        noun_counter(replace(options, spacy_model=str(tmp_path / "gone")))
    other = tmp_path / "other"
    other.mkdir()
    meta = json.loads((spacy_model / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "version": "9.9"}))
    with pytest.raises(ShardError, match=r"9\.9"):
        noun_counter(replace(options, spacy_model=str(other)))
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ShardError, match="cannot be loaded here"):
        noun_counter(replace(options, spacy_model=str(other)))


def test_counting_takes_little_of_the_time_of_a_clip():
    count_nouns = noun_counter(noun_options(EntityConfig(tagger="pattern")))
    count_nouns(CAPTIONS)
    times = []
    for _ in range(5):
        start = time.process_time()
        count_nouns(CAPTIONS * 50)
        times.append((time.process_time() - start) / (len(CAPTIONS) * 50))
    # Three per cent of a clip that takes 150 ms; a caption takes about 0.1 ms.
    assert min(times) < 0.0045


@pytest.mark.parametrize("loader", [AutoTokenizer, BertTokenizerFast])
def test_transformers_loads_the_trained_tokenizer(tmp_path, loader):
    save_tokenizer(train_wordpiece(CAPTIONS, 400, ("a video of footage",)), tmp_path)
    tokenizer = loader.from_pretrained(str(tmp_path))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.tokenize("A Video of FOOTAGE") == ["a", "video", "of", "footage"]
    encoded = tokenizer("two dogs", padding="max_length", max_length=8, truncation=True)
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert encoded["input_ids"][-1] == 0
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "two dogs"
    assert len(tokenizer) == len((tmp_path / "vocab.txt").read_text().splitlines())


def test_unseen_words_are_spelled_out():
    tokens = train_wordpiece(CAPTIONS, 400).encode("xylophone 42 Ünïcode").tokens
    assert "[UNK]" not in tokens


def test_the_vocabulary_keeps_to_its_size():
    assert train_wordpiece(CAPTIONS * 3, 256).get_vocab_size() <= 256


def test_the_same_texts_give_the_same_vocabulary_in_another_process():
    script = (
        "import sys, json; from alpro_sharding.wordpiece import train_wordpiece;"
        "print(json.dumps(sorted(train_wordpiece(json.loads(sys.argv[1]), 300).get_vocab().items())))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script, json.dumps(CAPTIONS)], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert len(json.loads(runs.pop())) > 72
