"""Training on from weights: what counts in the loss, adapters, and where the weights come from."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from mintrain import arrays, chat, data, generate, hf, load, load_hf, logits, lora, loss, sharding, step
from mintrain.checkpoint import load_run
from mintrain.config import Config, ConfigError, Data, Lora, Mesh
from mintrain.tokenizer import load_tokenizer

HERE = Path(__file__).parent
TEXT = "what is the name of a cat dog tree it she he red green blue one two three user model system"
WORDS = TEXT.split()
SPECIAL = ["<bos>", "<eos>", "<turn>", "</turn>", "[UNK]", "\n"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'bad' %}{{ raise_exception('no role bad') }}{% endif -%}
<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""
ANSWERS = {"cat": "it is red", "dog": "she is green", "tree": "he is blue", "name": "one two three"}
CHATS = [
    {"messages": [{"role": "user", "content": f"what is the {noun}"}, {"role": "assistant", "content": answer}]}
    for noun, answer in ANSWERS.items()
] * 8
PAIRS = [{"prompt": f"what is the {noun}", "response": f" {answer}"} for noun, answer in ANSWERS.items()] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a small Gemma 3 with a tokenizer of words, a chat template and two final ids."""
    to = tmp_path_factory.mktemp("gemma")
    for name in ("config.json", "model.safetensors"):
        (to / name).write_bytes((HERE / "cases" / "gemma3" / name).read_bytes())
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(to / "tokenizer.json"))
    (to / "chat_template.jinja").write_text(TEMPLATE)
    names = {
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (to / "tokenizer_config.json").write_text(json.dumps(names))
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return to


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder / "tokenizer.json"))


def jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --------------------------------------------------------------------------------------- what counts


def words(tokenizer, ids, counts, which=True) -> str:
    """The tokens that count, or those that do not, special ones too."""
    names = dict(enumerate([*SPECIAL, *WORDS]))
    return " ".join(names[i] for i, count in zip(ids, counts, strict=True) if count == which).replace("\n", "/")


def test_answers_count_with_the_token_that_ends_them_and_nothing_else_does(tokenizer):
    turns = [
        ("system", "red cat"),
        ("user", "what is it"),
        ("assistant", "a dog"),
        ("user", "she"),
        ("assistant", "he"),
    ]
    ids, counts = chat.example(tokenizer, {"messages": [dict(role=role, content=text) for role, text in turns]})
    assert words(tokenizer, ids, counts) == "a dog </turn> / he </turn> /"
    expected = "<bos> <turn> system / red cat </turn> / <turn> user / what is it </turn> / <turn> model /"
    assert words(tokenizer, ids, counts, False) == f"{expected} <turn> user / she </turn> / <turn> model /"
    ids, counts = chat.example(tokenizer, PAIRS[0])
    assert words(tokenizer, ids, counts) == "it is red <eos>"
    assert words(tokenizer, ids, counts, False) == "<bos> what is the cat"


def test_a_conversation_is_rendered_as_transformers_renders_it(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = CHATS[0]["messages"]
    assert theirs.apply_chat_template(messages, tokenize=False) == chat.render(tokenizer, messages, False)
    ids = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids == chat.prompt_ids(tokenizer, messages[0]["content"])


@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "a"}, 'not both a "prompt" and a "response"'),
        ({"prompt": "a", "response": 3}, 'not both a "prompt" and a "response"'),
        ({"messages": []}, "with an answer of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "with an answer of the assistant"),
        ({"messages": "a"}, "with an answer of the assistant"),
        ({"messages": [{"role": "bad", "content": "a"}, {"role": "assistant", "content": "a"}]}, "no role bad"),
        (["a"], "is no object"),
    ],
)
def test_a_line_that_is_no_conversation_is_an_error_with_its_number(line, message, folder, tmp_path):
    path = jsonl(tmp_path / "chats.jsonl", [CHATS[0], line])
    with pytest.raises(ConfigError, match=rf"chats\.jsonl line 2 .*{re.escape(message)}"):
        data._open(path, load_tokenizer(str(folder / "tokenizer.json")), 32)


def test_a_template_that_cannot_be_used_is_an_error(tokenizer):
    rewriting = dataclasses.replace(
        tokenizer, template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="writes the text before it in another way"):
        chat.example(rewriting, CHATS[0])
    reaching = dataclasses.replace(tokenizer, template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ConfigError, match="refused by the chat template"):
        chat.example(reaching, CHATS[0])
    with pytest.raises(ConfigError, match="no chat template"):
        chat.example(load_tokenizer("bytes"), CHATS[0])


PARTS = [{"type": "text", "text": "it is"}, {"type": "text", "text": " red"}]
BY_PARTS = (
    "{{ bos_token }}{% for m in messages %}<turn>{% if m.content is string or not m.content %}{{ m.content or '' }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}</turn>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (BY_PARTS, PARTS, "<bos><turn>what</turn><turn>it is red</turn>"),
        (BY_PARTS, None, "<bos><turn>what</turn><turn></turn>"),
        (BY_PARTS, 7, "no text for the chat template"),
        (TEMPLATE, PARTS, "no text for the chat template"),
        (TEMPLATE, None, "writes as a word"),
        (TEMPLATE, {"text": "red"}, "no text for the chat template"),
        ("{% for m in messages %}{{ 'a' + m.content }}{% endfor %}", PARTS, "cannot be rendered by .*TypeError"),
        ("{{ 1 // (messages | length - 2) }}", "red", "cannot be rendered by .*ZeroDivisionError"),
        ("{{ raise_exception(5) }}", "red", "refused by the chat template: 5"),
    ],
)
def test_contents_are_rendered_as_the_template_takes_them_or_refused(template, content, expected, tokenizer):
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": content}]
    other = dataclasses.replace(tokenizer, template=template)
    if expected.startswith("<bos>"):
        assert "".join(text for text, _ in chat._messages(other, messages)) == expected
        return
    with pytest.raises(ConfigError, match=expected) as error:
        chat.example(other, {"messages": messages})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content | tojson }}", '"what\'s <é>"'),
        ("{{ messages[0] | tojson(indent=1, ensure_ascii=True) }}", '{\n "content": "what\'s <\\u00e9>"\n}'),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}.", "what's <é>."),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ],
)
def test_a_template_finds_what_transformers_gives_it(template, expected, tokenizer):
    other = dataclasses.replace(tokenizer, template=template)
    assert chat.render(other, [{"content": "what's <é>"}], False) == expected
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:
        return
    assert _compile_jinja_template(template).render(messages=[{"content": "what's <é>"}]) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=30), st.integers(4, 12))
def test_packing_keeps_every_example_whole_in_one_row(sizes, length):
    """Example i is bos and i + 1 again and again: first what it reads, then what it answers."""
    examples = [([0] + [i + 1] * (a + b - 1), [False] * a + [True] * b) for i, (a, b) in enumerate(sizes)]
    ids, counts, segments, cut = chat.pack(examples, length)
    assert cut == sum(len(e[0]) > length for e in examples) and ids[-1] == counts[-1] == segments[-1] == 0
    rows, marks, parts = (x[:-1].reshape(-1, length) for x in (ids, counts, segments))
    packed = [
        (row[part == n].tolist(), mark[part == n].tolist())
        for row, mark, part in zip(rows, marks, parts, strict=True)
        for n in range(1, part.max() + 1)
    ]
    kept = [(i[:length], c[:length]) for i, c in examples if any(c[:length])]
    assert sorted(packed) == sorted(kept)
    assert not rows[parts == 0].any() and not marks[parts == 0].any()
    for part in parts:  # from the left, without a hole
        assert np.all(np.isin(np.diff(part[part > 0]), (0, 1))) and part[: (part > 0).sum()].all()


@pytest.mark.parametrize("length", [27, 60], ids=["one a row", "several a row"])
@pytest.mark.parametrize("case", ["deepseek-v3", "deepseek-v3.2", "gemma4-moe"])
def test_what_fills_up_packed_chats_counts_nowhere(case, length, tokenizer, tmp_path):
    """Packed, and each chat in a row that it just fills: the same loads, from which biases move, and the same means.

    The balance loss is one of each row's, so it is compared where rows hold one chat.
    """
    answers = ["it is red", "she is green", "he is blue", "one two three", "two", "red"] * 2
    asked = {"role": "user", "content": "what is the name of a cat dog tree"}
    lines = [{"messages": [asked, {"role": "assistant", "content": answer}]} for answer in answers]
    stream = data._open(jsonl(tmp_path / "chats.jsonl", lines), tokenizer, length, 256)
    model = load_hf(HERE / "cases" / case)
    examples = [chat.example(tokenizer, line) for line in lines]
    assert len({len(ids) for ids, _ in examples}) > 1

    def report(rows):
        arrays = [np.stack(x) for x in zip(*rows, strict=True)]
        mesh = model.norm.scale.sharding.mesh
        batch = loss.Batch(*jax.device_put(arrays, NamedSharding(mesh, P(*sharding.BATCH[1:]))))
        cfg = Config(model.cfg, data=Data(seq_len=arrays[0].shape[1]), per_device_batch_size=len(rows))
        counts = step.count(batch)
        return jax.jit(step.sharded_loss(cfg, mesh, model))(model, batch, counts)[1], counts

    packed, counts = report([stream.row(i, length) for i in range(0, len(stream.ids) - 1, length)])
    assert (len(stream.ids) // length == len(lines)) == (length == 27)
    assert counts.tokens == sum(len(ids) for ids, _ in examples) and counts.targets == sum(sum(c) for _, c in examples)

    alone = {}  # by length, so that few programs are compiled
    for ids, marks in examples:
        n = len(ids)
        row = np.array(ids), np.array([*ids[1:], 0]), np.arange(n), np.ones(n), np.array([*marks[1:], 0])
        alone.setdefault(n, []).append([*(x.astype(np.int32) for x in row[:4]), row[4].astype(np.float32)])
    parts = [report(rows)[0] for rows in alone.values()]
    total = lambda name: sum(float(getattr(part, name)) for part in parts)
    for ours, *theirs in zip(packed.load, *(part.load for part in parts), strict=True):
        if ours is not None:
            np.testing.assert_array_equal(ours, sum(map(np.asarray, theirs)))
    np.testing.assert_allclose(packed.nll, total("nll"), rtol=1e-6)
    assert (packed.indexer_kl is None) == (case != "deepseek-v3.2")
    if packed.indexer_kl is not None:
        np.testing.assert_allclose(packed.indexer_kl, total("indexer_kl"), rtol=1e-6)
    if length == 27 and packed.balance is not None:
        np.testing.assert_allclose(packed.balance, total("balance"), rtol=1e-6)


@pytest.mark.parametrize("form", ["chats", "pairs", "texts"])
def test_a_tokenizer_may_have_added_tokens_without_a_row_but_a_text_may_not(
    form, tokenizer, folder, tmp_path, monkeypatch
):
    """Gemma 3 1B has 262144 rows, and its tokenizer an image's token with that id."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    larger = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    larger.add_special_tokens(["<image>"])
    larger.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    larger, rows = load_tokenizer(str(tmp_path / "tokenizer.json")), tokenizer.vocab
    assert (larger.vocab, larger.ordinary) == (rows + 1, rows)
    text = "what is the cat it is red"
    make = {
        "chats": lambda t: {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "red"}]},
        "pairs": lambda t: {"prompt": t, "response": " red"},
        "texts": lambda t: {"text": t},
    }[form]
    stream = data._open(jsonl(tmp_path / "good.jsonl", [make(text)] * 3), larger, 30, rows)
    assert stream.ids.max() < rows
    place = "document 2" if form == "texts" else "line 2"
    with pytest.raises(ConfigError, match=f"{place} has token id {rows}, .*model.vocab={rows}"):
        data._open(jsonl(tmp_path / "bad.jsonl", [make(text), make(f"{text} <image>"), make(text)]), larger, 30, rows)


def test_prompt_tokens_get_no_loss(folder, tokenizer, tmp_path):
    """By gradient: other targets in the prompt's places change no gradient; without answers there is none at all."""
    stream = data._open(jsonl(tmp_path / "chats.jsonl", CHATS), tokenizer, 40, 256)
    model = load_hf(folder)
    cfg = Config(model.cfg, data=dataclasses.replace(tiny.CONFIG.data, seq_len=40), per_device_batch_size=2)
    mesh = model.norm.scale.sharding.mesh
    batch = data.train_batch(stream, step.abstract_batch(cfg, mesh), 0, 0)
    answers = np.asarray(batch.weights, bool)
    assert 0 < answers.sum() < answers.size / 2
    loss = step.sharded_loss(cfg, mesh, model)
    grad = jax.jit(jax.grad(lambda m, b: loss(m, jax.tree.map(lambda x: x[0], b), step.count(b))[0]))
    other = np.where(answers, batch.targets, (np.asarray(batch.targets) + 7) % 200)
    assert (other != batch.targets).any()
    plain = grad(model, batch)
    jax.tree.map(
        np.testing.assert_array_equal,
        plain,
        grad(model, dataclasses.replace(batch, targets=jax.device_put(other, batch.targets.sharding))),
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain.stages[0][0].attention))
    silent = grad(model, dataclasses.replace(batch, weights=batch.weights * 0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(silent))


# ------------------------------------------------------------------------------------------- adapters


def adapted(model, mesh: Mesh, rows: int = 8) -> Config:
    return dataclasses.replace(
        tiny.CONFIG,
        model=model,
        mesh=mesh,
        lora=Lora(rank=3, alpha=6.0),
        init_from="somewhere",
        per_device_batch_size=rows / mesh.devices,
    )


@pytest.mark.parametrize("name", ["MODEL", "GEMMA4", "DEEPSEEK"])
def test_only_adapters_are_trained_and_merging_them_changes_no_logit(name):
    cfg = adapted(getattr(tiny, name), Mesh())
    mesh = sharding.make_mesh(cfg.mesh)
    base = step.new_state(dataclasses.replace(cfg, lora=Lora()), mesh).model
    tokens = np.asarray(tiny.batch(0).tokens)
    before, kept = logits(base, tokens), jax.tree.map(np.array, base)
    state = step.new_state(cfg, mesh, base)
    np.testing.assert_array_equal(logits(state.model, tokens), before)  # nothing yet
    held = {jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(state.opt) if leaf.ndim}
    assert held and all("adapters" in path for path in held)

    train_step, losses = step.make_train_step(cfg, mesh), []
    for _ in range(5):
        state, metrics = train_step(state, tiny.on_mesh(cfg, mesh, tiny.batch(0)))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    frozen = [np.asarray(w.value) for w in arrays.weights(state.model) if "adapters" not in w.path]
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.tree.leaves(kept))
    merged = lora.merge(state.model)
    assert jax.tree.structure(merged) == jax.tree.structure(kept)
    arrays.check(merged)
    after = logits(state.model, tokens)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(logits(merged, tokens), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", [Mesh(fsdp=2, tensor=2), Mesh(context=2, fsdp=2)], ids=str)
def test_adapters_on_a_mesh_train_as_on_one_device(mesh):
    def losses(mesh: Mesh) -> list[float]:
        cfg = adapted(tiny.MODEL, mesh)
        devices = sharding.make_mesh(mesh)
        state, train_step, found = (
            step.new_state(cfg, devices, step.new_state(dataclasses.replace(cfg, lora=Lora()), devices).model),
            step.make_train_step(cfg, devices),
            [],
        )
        for seed in range(5):
            state, metrics = train_step(state, tiny.on_mesh(cfg, devices, tiny.batch(seed)))
            found.append((float(metrics.loss), float(metrics.grad_norm)))
        return found

    np.testing.assert_allclose(losses(mesh), losses(Mesh()), rtol=1e-5)


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_requested", False)
    return tmp_path


QUICK = [
    "--per_device_batch_size",
    "4",
    "--data.seq_len",
    "40",
    "--steps",
    "30",
    "--optim.warmup",
    "2",
    "--eval_every",
    "15",
    "--sample_tokens",
    "4",
    "--compute_dtype",
    "float32",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, records",
    [(["--optim.lr", "3e-3"], CHATS), (["--optim.lr", "1e-2", "--lora.rank", "4"], PAIRS)],
    ids=["full chats", "lora pairs"],
)
def test_a_released_folder_is_trained_on_exported_and_answers(options, records, folder, here, capsys):
    path = jsonl(here / "lines.jsonl", records)
    assert train.main([str(folder), "--data.path", str(path), "--run", "tuned", *QUICK, *options]) == 0
    lines = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    held = [line["val_loss"] for line in lines if "val_loss" in line]
    assert held[-1] < 0.5 * lines[0]["loss"], lines
    assert train.main([str(folder), "--data.path", str(path), "--run", "tuned", *QUICK, *options]) == 0  # it is done

    assert hf.main(["export", "runs/tuned", "out"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (here / "out" / name).read_bytes() == (folder / name).read_bytes()
    exported, run = load_hf("out"), load_run(Path("runs/tuned"), Mesh())[1]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(exported), jax.tree.leaves(run))
    assert not np.array_equal(exported.stages[0][0].attention.q, load_hf(folder).stages[0][0].attention.q)

    capsys.readouterr()
    question = ["--prompt", "what is the cat", "--temperature", "0", "--tokens", "8", *["--chat"] * (records is CHATS)]
    assert generate.main(["runs/tuned", *question]) == 0
    answer = capsys.readouterr().out
    assert answer.startswith("what is the cat") and len(answer.split()) > 4
    assert generate.main(["out", *question]) == 0
    assert capsys.readouterr().out == answer


def test_a_run_starts_from_the_weights_of_another_one_and_the_warmup_is_followed_by_the_sparse_stage(here):
    config = str(HERE.parent / "configs" / "tiny_deepseek.py")
    quick = ["--steps", "2", "--sample_tokens", "0", "--eval_batches", "1", "--eval_every", "9"]
    assert train.main([config, "--indexer", "warmup", "--run", "warm", *quick]) == 0
    assert train.main([config, "--run", "warm", *quick]) == 2  # another stage is another run
    assert train.main([config, "--run", "sparse", "--init_from", "runs/warm", *quick]) == 0
    _, warm = load_run(Path("runs/warm"), Mesh())
    cfg = dataclasses.replace(load_run(Path("runs/sparse"), Mesh())[0])
    start = load.initial(cfg, step.abstract_model(cfg, sharding.make_mesh(Mesh())))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(start), jax.tree.leaves(warm))
    assert not start.stages[0][0].attention.warmup and warm.stages[0][0].attention.warmup


@pytest.mark.parametrize(
    "options, message",
    [
        (["--init_from", "nowhere"], "init_from=nowhere is not a folder"),
        (["--lora.rank", "4"], "give the weights with --init_from"),
        (["--init_from", str(HERE / "cases" / "gemma2")], "has another model: "),
        (["--lora.rank", "-1"], "lora.rank=-1 is no rank"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(options, message, here, capsys):
    assert train.main([str(HERE / "tiny_run.py"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/tiny_run/checkpoints").exists()


def test_a_folder_without_a_tokenizer_cannot_be_trained_on(here, capsys):
    assert train.main([str(HERE / "cases" / "gemma2")]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.slow
def test_reading_a_checkpoint_takes_little_more_host_memory_than_its_devices_hold():
    """1 GB, in a process of its own; it exits with 1 above 1.3 times the largest file."""
    script = [sys.executable, str(HERE.parent / "docs" / "measure_load.py")]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(script, env={**environment, "PYTHONPATH": str(HERE.parent)}, capture_output=True, text=True)
    assert done.returncode == 0 and "host peak" in done.stdout, done.stdout + done.stderr
