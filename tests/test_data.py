"""Batches are a pure function of seed and step, cover the text once an epoch, and know their documents."""

import json
import lzma

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintrain import config, data, options, sharding, step
from mintrain.config import ConfigError
from mintrain.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stream(tokens, vocab=11, bos=0):
    return data.Stream("test", np.array(tokens, np.uint16), vocab, bos, 1.0)


def shapes(batch=2, length=5, accumulate=1, **mesh):
    tiny = options.read(options.Path(__file__).parent / "tiny_run.py")
    mesh = config.Mesh(**mesh)
    cfg = options.parse(
        config.Config,
        [f"--data.seq_len={length}", f"--per_device_batch_size={batch / mesh.devices}", f"--accumulate={accumulate}"]
        + [f"--mesh.{name}={size}" for name, size in zip(sharding.AXES, mesh.sizes, strict=True)],
        tiny,
    )
    return step.abstract_batch(cfg, sharding.make_mesh(mesh))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 5))
def test_the_stateless_permutation_is_one(size, seed, epoch):
    assert sorted(data.permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_the_permutation_depends_on_seed_and_epoch():
    order = lambda seed, epoch: [data.permute(i, 50, seed, epoch) for i in range(50)]
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 1) != list(range(50))


@settings(deadline=None, max_examples=50)
@given(st.integers(6, 200), st.integers(1, 40), st.integers(0, 99))
def test_an_epoch_visits_each_row_once_and_stays_inside(tokens, length, seed):
    length = min(length, tokens - 1)
    s = stream([0] * tokens)
    rows = max((tokens - 1) // length - 1, 1)
    for epoch in range(2):
        starts = [data.train_start(s, epoch * rows + i, length, seed) for i in range(rows)]
        assert len({start // length for start in np.array(starts) - min(starts)}) == rows
        assert min(starts) >= 0
        assert max(starts) + length + 1 <= tokens


def test_a_row_knows_its_documents_targets_and_padding():
    tokens, targets, positions, segments, weights = stream([3, 4, 0, 5, 6, 0, 7, 8]).row(0, 9)
    assert tokens.tolist() == [3, 4, 0, 5, 6, 0, 7, 8, 0]
    assert targets.tolist()[:7] == [4, 0, 5, 6, 0, 7, 8]
    assert positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 0]
    assert segments.tolist() == [1, 1, 2, 2, 2, 3, 3, 0, 0]
    assert weights.tolist() == [1.0] * 7 + [0.0] * 2


def test_a_batch_is_the_same_on_any_mesh_and_for_any_accumulation():
    text = stream(np.random.default_rng(0).integers(0, 11, 400))
    one = data.train_batch(text, shapes(8, 12), 7, 3)
    for other in (shapes(8, 12, fsdp=4, context=2), shapes(8, 12, accumulate=2, replica=2), shapes(8, 12, tensor=8)):
        again = data.train_batch(text, other, 7, 3)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a)[0], np.asarray(b).reshape(8, 12)), one, again
        )
    assert not np.array_equal(one.tokens, data.train_batch(text, shapes(8, 12), 8, 3).tokens)
    assert not np.array_equal(one.tokens, data.train_batch(text, shapes(8, 12), 7, 4).tokens)


def test_the_held_out_batches_count_every_target_once():
    text = stream([0, *range(1, 11)] * 3)
    batches = list(data.heldout_batches(text, shapes(2, 5), 99))
    assert sum(count for _, count in batches) == 32
    assert sum(float(batch.weights.sum()) for batch, _ in batches) == 32
    seen = np.concatenate([np.asarray(batch.targets)[np.asarray(batch.weights) > 0] for batch, _ in batches])
    assert seen.tolist() == text.ids[1:].tolist()
    assert len(list(data.heldout_batches(text, shapes(2, 5), 2))) == 2


def test_text_jsonl_and_compressed_files_give_the_same_tokens(tmp_path):
    text = "To be, or not to be,\n\nthat is the question: é\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text, "title": "x"}) + "\n\n")
    with lzma.open(tmp_path / "c.jsonl.xz", "wt") as file:
        file.write(json.dumps({"text": text}))
    for name in ("shakespeare", "bytes"):
        tokenizer = load_tokenizer(name)
        streams = [data._open(tmp_path / file, tokenizer, 8) for file in ("a.txt", "b.jsonl", "c.jsonl.xz")]
        assert all(s.ids.tolist() == streams[0].ids.tolist() for s in streams)
        assert streams[0].ids[0] == tokenizer.bos
        assert tokenizer.decode(streams[0].ids[1:].tolist()) == text
        assert streams[0].bytes_per_token == len(text.encode()) / len(streams[0].ids)
    np.array([0, 3, 4], np.uint16).tofile(tmp_path / "d.bin")
    assert data._open(tmp_path / "d.bin", tokenizer, 8).ids.tolist() == [0, 3, 4]


def test_a_sentencepiece_model_works(tmp_path):
    import sentencepiece

    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=18, minloglevel=2
    )
    tokenizer = load_tokenizer(str(tmp_path / "m.model"))
    ids = data._open(text, tokenizer, 8).ids
    assert ids[0] == tokenizer.bos
    assert tokenizer.vocab == 18
    assert tokenizer.decode(ids[1:20].tolist()).startswith("the cat sat")


def test_cutting_a_long_text_into_pieces_changes_no_token(monkeypatch):
    tokenizer = load_tokenizer("shakespeare")
    with lzma.open(options.Path(data.__file__).parent / "assets" / "shakespeare_heldout.jsonl.xz", "rt") as file:
        text = json.loads(next(file))["text"][:20_000]
    whole = next(tokenizer.encode([text]))
    monkeypatch.setattr(data, "PIECE", 700)
    pieces = list(data._pieces(text))
    assert len(pieces) > 20
    assert "".join(pieces) == text
    assert [i for ids in tokenizer.encode(pieces) for i in ids] == whole


def test_whole_documents_are_held_out_and_the_end_of_a_single_one():
    train, heldout = data._split(stream([0, 1, 2, 3, 0, 4, 5, 0, 6, 7]), 0.2, 8)
    assert (train.ids.tolist(), heldout.ids.tolist()) == ([0, 1, 2, 3, 0, 4, 5], [0, 6, 7])
    train, heldout = data._split(stream([0, *range(1, 10)]), 0.2, 8)
    assert heldout.ids.tolist() == [8, 9]
    with pytest.raises(ConfigError, match="heldout_fraction"):
        data._split(stream([0, 1]), 0.0, 8)


def test_the_held_out_plays_are_whole_and_in_nobody_elses_text():
    def titles(part):
        with lzma.open(options.Path(data.__file__).parent / "assets" / f"shakespeare_{part}.jsonl.xz", "rt") as file:
            return {json.loads(line)["title"]: json.loads(line)["text"] for line in file}

    train, heldout = titles("train"), titles("heldout")
    assert (len(train), sorted(heldout)) == (35, ["Henry V", "Macbeth", "Twelfth Night"])
    assert not set(train) & set(heldout)
    assert "Tomorrow, and tomorrow" not in "".join(train.values())
