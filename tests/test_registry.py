"""Known models and names: what a file of models may say, and what a name means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_home import FILES, PARTS, REPOSITORY, SMALL

from localds.catalog import known as registry
from localds.catalog.known import (
    SUGGESTION,
    RegistryError,
    known_models,
    read_models,
    shipped_file,
    user_file,
)
from localds.catalog.names import UnknownModelError, UnknownQuantError, parse
from localds.catalog.variants import VariantError, choose, find_variants
from localds.memory.plan import estimate

ENTRY = """
[tiny]
title = "Tiny"
repository = "owner/tiny"
[tiny.quants]
Q8_0 = { files = "tiny-Q8_0.gguf", size = "1.5 GB" }
"""


def test_shipped_models_are_in_order() -> None:
    models = read_models(shipped_file())
    assert SUGGESTION in models
    for model in models.values():
        assert model.title
        assert model.context
        assert model.license
        for quant in model.quants.values():
            assert quant.size > 1e9, (model.name, quant)
            assert estimate(quant.size) > quant.size


def test_shipped_file_is_found_where_the_package_is(tmp_path: Path) -> None:
    """In a wheel, models.toml lies in the package."""
    package = tmp_path / "localds"
    (package / "catalog").mkdir(parents=True)
    sources = Path(registry.__file__).parent.parent
    for name in ("__init__", "settings", "units", "catalog/__init__", "catalog/known"):
        (package / f"{name}.py").write_bytes((sources / f"{name}.py").read_bytes())
    (package / "models.toml").write_text(ENTRY)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__];"
        "from localds.catalog.known import *; print(shipped_file(), *read_models(shipped_file()))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(package / "models.toml"), "tiny"]


@pytest.mark.usefixtures("home")
def test_the_users_entries_replace_and_add() -> None:
    assert known_models()["tiny"].title == "Tiny Chat"
    user_file().write_text(ENTRY + ENTRY.replace("tiny", SUGGESTION))
    models = known_models()
    assert models["tiny"].quants["Q8_0"].size == 1_500_000_000
    assert models["tiny"].default == "Q8_0"
    assert models[SUGGESTION].repository == f"owner/{SUGGESTION}"
    assert len(models) == len(read_models(shipped_file())) + 1
    user_file().unlink()
    assert "tiny" not in known_models()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[tiny]", "[tiny", "this is not TOML"),
        ("[tiny]", "['ti ny']", "rename it"),
        ('title = "Tiny"', "", r"\[tiny\]: title is missing; add it"),
        ("title =", "titel =", r"\[tiny\]: titel is not a key; write title"),
        ("title =", "xyzzy =", r"xyzzy is not a key; the keys are title, repository"),
        ('"Tiny"', "5", r"title is 5; write a text in quotes"),
        ('"owner/tiny"', '"tiny"', r"repository is 'tiny'; write it like owner/name"),
        ('title = "Tiny"', 'title = "T"\ndefault = "Q9"', "default is 'Q9'; write one of"),
        ('title = "Tiny"', 'title = "T"\ncontext = true', "context is True; write a whole number"),
        ('"1.5 GB"', '"large"', r"\[tiny.quants\] Q8_0: size 'large' is not understood"),
        ('"1.5 GB"', "-1", r"size is -1; write bytes"),
        (', size = "1.5 GB"', "", r"Q8_0: write { files"),
        ('"tiny-Q8_0.gguf"', '"tiny"', "files is 'tiny'; write a pattern that ends in .gguf"),
        ('Q8_0 = { files = "tiny-Q8_0.gguf", size = "1.5 GB" }', "", "quants is empty"),
    ],
)
@pytest.mark.usefixtures("home")
def test_a_mistake_is_one_clear_error(old: str, new: str, message: str) -> None:
    assert old in ENTRY
    user_file().write_text(ENTRY.replace(old, new))
    with pytest.raises(RegistryError, match=message) as caught:
        known_models()
    assert str(caught.value).startswith(f"{user_file()}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("home")
def test_an_entry_that_is_no_table() -> None:
    user_file().write_text("tiny = 5")
    with pytest.raises(RegistryError, match=r"\[tiny\]: this is no table"):
        known_models()


@pytest.mark.usefixtures("home")
def test_names() -> None:
    reference = parse("TINY")
    assert (reference.repository, str(reference)) == (REPOSITORY, "tiny")
    assert reference.known_quant is not None
    assert reference.known_quant.name == "Q4_K_M"
    assert str(parse("tiny:q8_0")) == "tiny:Q8_0"
    assert parse("some.one/some-Thing:iq4_xs").known is None
    with pytest.raises(UnknownModelError, match=r"^tinny: .* did you mean tiny\? `localds list`"):
        parse("tinny")
    with pytest.raises(UnknownQuantError, match=r"no quant 'Q5_K_M' is known, only Q4_K_M, Q8_0;"):
        parse("tiny:Q5_K_M")
    for text in ("", ":Q8_0", "a/b/c", "/abs", "owner/..", "http://x/y", "ti ny"):
        with pytest.raises(UnknownModelError):
            parse(text)


@pytest.mark.usefixtures("home")
def test_a_known_model_has_the_files_of_its_pattern() -> None:
    assert parse("tiny").choose(FILES).files == (SMALL,)
    assert parse("tiny:Q8_0").choose(FILES).files == PARTS
    with pytest.raises(UnknownQuantError, match=r"has Q8_0/.* but there is Q2_K, Q4_K_M; correct"):
        parse("tiny:Q8_0").choose([name for name in FILES if name not in PARTS])
    with pytest.raises(UnknownQuantError):
        parse("tiny:Q8_0").choose([name for name in FILES if name != PARTS[1]])


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("DeepSeek-V2-Lite-Chat-Q4_K_M.gguf", "Q4_K_M"),
        ("DeepSeek-V2-Lite-Chat.Q4_K_S.gguf", "Q4_K_S"),
        ("deepseek-coder-v2-lite-instruct-q4_0.gguf", "Q4_0"),
        ("deepseek_v2_iq4_xs.gguf", "IQ4_XS"),
        ("UD-Q4_K_XL/DeepSeek-R1-UD-Q4_K_XL-00001-of-00001.gguf", "UD-Q4_K_XL"),
        ("model.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("BF16/GLM-4.7-Flash-BF16-00001-of-00001.gguf", "BF16"),
        ("kimi-k2-TQ1_0.gguf", "TQ1_0"),
        ("Moonlight-16B-A3B-Q4_K.gguf", "Q4_K"),
        ("x-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("model-f16.gguf", "F16"),
        ("guide.gguf", "guide"),
    ],
)
def test_quants_are_read_from_names(name: str, quant: str) -> None:
    assert [variant.quant for variant in find_variants([name])] == [quant]


def test_choosing_a_variant() -> None:
    variants = find_variants(FILES)
    assert [variant.quant for variant in variants] == ["Q8_0", "Q2_K", "Q4_K_M"]
    assert choose(variants, None, "x").files == (SMALL,)
    assert choose(variants, "q8_0", "x").files == PARTS
    with pytest.raises(VariantError, match=r"^x: no 'Q5_K'; .* a colon: Q8_0, Q2_K, Q4_K_M$"):
        choose(variants, "Q5_K", "x")
    with pytest.raises(VariantError, match="x: several variants; add one of these"):
        choose(variants[:2], None, "x")
    assert choose(variants[:1], None, "x").files == PARTS
    with pytest.raises(VariantError, match="there is no GGUF file"):
        choose([], None, "x")


def test_variants_that_share_a_quant() -> None:
    names = ["a-Q8_0.gguf", "b-UD-Q8_0.gguf", "a-UD-Q8_0.gguf", "c-Q4_K_M.gguf"]
    variants = find_variants(names)
    assert choose(variants, "Q8_0", "x").files == ("a-Q8_0.gguf",)
    assert choose(variants, "b-ud-q8_0", "x").files == ("b-UD-Q8_0.gguf",)
    with pytest.raises(VariantError, match=r"'UD-Q8_0'; .*: a-UD-Q8_0, b-UD-Q8_0$"):
        choose(variants, "UD-Q8_0", "x")
    split = find_variants(["a-Q8_0-00001-of-00002.gguf"])
    with pytest.raises(VariantError, match=r"a-Q8_0-00002-of-00002\.gguf is not there"):
        choose(split, "Q8_0", "x")
