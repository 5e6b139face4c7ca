"""The study says what the functions do, and writes it where the document has a place for it."""

import jax
import jax.numpy as jnp
import numpy as np

from mintrain import study


def test_rounding_is_that_of_bfloat16_also_when_compiled():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(study.rounded)(x), x.astype(jnp.bfloat16).astype(np.float32))


def test_only_boolean_masks_give_a_query_without_keys_nothing():
    text, verdict, _ = study.masks()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()[2:]}
    assert "| 0 | 0 | finite | finite |" in rows["boolean (mintrain)"]
    assert "NaN" in rows["two masks of -0.7 max(float32) added"] and "boolean" not in verdict


def test_the_document_gets_new_tables_between_its_marks_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "EXPERIMENTS", (study.overflow, study.masks))
    document = tmp_path / "numerics.md"
    document.write_text(
        "before\n<!-- study masks -->\nold\n<!-- end -->\nafter\n<!-- study training -->\nkept\n<!-- end -->\n"
    )
    study.main(tmp_path)
    text = document.read_text()
    assert text.startswith("before\n<!-- study masks -->\nWhat does a query do that sees no key?")
    assert "old" not in text and text.endswith("<!-- end -->\nafter\n<!-- study training -->\nkept\n<!-- end -->\n")
    first = text
    study.main(tmp_path)
    assert document.read_text() == first
