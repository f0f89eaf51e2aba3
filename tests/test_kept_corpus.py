import dataclasses
import importlib
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dreamer4.batch import BatchSpec, fake_batch
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToyConfig
from dreamer4.train.checkpoint import Identity
from noise_runs import noise_run
from noise_worlds import EXPERIMENTS
from stores import add_latents, ids_of, write_store

pytestmark = pytest.mark.usefixtures("kept_compilations")
TOKENIZER = Identity(3, "ab" * 32)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield {name: importlib.import_module(name) for name in ("kept_corpus", "train_dynamics", "train_maskgit")}


@pytest.fixture
def kept(scripts, tmp_path):
    """A function that opens the corpus of a key, in one folder."""
    return lambda **key: scripts["kept_corpus"].KeptCorpus(tmp_path / "corpus", {"count": 4} | key)


def make_corpus(seed=0):
    batch = jax.device_get(fake_batch(BatchSpec(4, 3, 2, 2), seed))
    latents = np.random.default_rng(seed).normal(size=(4, 3, 2, 5)).astype(np.float32)
    return dataclasses.replace(batch, video=np.zeros((4, 3, 0, 0, 3), np.uint8), latents=latents)


def fail():
    raise AssertionError("encoded again")


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_was_kept_is_read_and_not_made_again(kept):
    first = kept()
    assert_same(first.get(make_corpus), make_corpus())
    assert not first.folder.exists()  # before the run has claimed its folder
    first.keep()
    again = kept()
    assert_same(again.get(fail), make_corpus())
    before = [path.stat().st_mtime_ns for path in again.folder.rglob("*")]
    again.keep()
    assert [path.stat().st_mtime_ns for path in again.folder.rglob("*")] == before


def test_what_was_read_is_kept_again_where_the_run_is_set_aside(kept):
    first = kept()
    first.get(make_corpus)
    first.keep()
    again = kept()
    again.get(fail)
    first.folder.rename(first.folder.with_name("corpus.1"))
    again.keep()
    assert_same(kept().get(fail), make_corpus())


def test_files_that_vanish_while_they_are_read_are_made_anew(kept, scripts, monkeypatch):
    first = kept()
    first.get(make_corpus)
    first.keep()
    verify = scripts["kept_corpus"].verify

    def vanish(folder):
        manifest = verify(folder)
        shutil.rmtree(folder)
        return manifest

    monkeypatch.setattr(scripts["kept_corpus"], "verify", vanish)
    assert_same(kept().get(lambda: make_corpus(1)), make_corpus(1))


def test_a_corpus_of_something_else_is_made_anew_and_replaced(kept):
    first, other = kept(), kept(count=5)
    first.get(make_corpus)
    first.keep()
    assert_same(other.get(lambda: make_corpus(1)), make_corpus(1))
    assert_same(kept().get(fail), make_corpus())  # until the run claims its folder
    other.keep()
    assert_same(kept(count=5).get(fail), make_corpus(1))
    assert kept().read() is None


def test_a_damaged_corpus_is_made_anew_and_said(kept, capsys):
    first = kept()
    first.get(make_corpus)
    first.keep()
    file = first.folder / "latents.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = kept()
    assert_same(again.get(make_corpus), make_corpus())
    assert "latents.npy is not as it was written; the corpus is encoded again" in capsys.readouterr().out
    again.keep()
    assert_same(kept().get(fail), make_corpus())


def test_a_full_disk_ends_nothing(kept, monkeypatch, capsys):
    first = kept()
    first.get(make_corpus)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        first.keep()
    assert "is not kept (No space left on device); going on encodes it again" in capsys.readouterr().out
    assert list(first.folder.parent.iterdir()) == []


@pytest.mark.parametrize("script", ["train_dynamics", "train_maskgit"])
def test_the_key_follows_all_that_the_corpus_follows(scripts, tmp_path, script):
    """The tokenizer, the data, which of its actions, and how much of it, how long."""
    script, key_of = scripts[script], scripts["kept_corpus"].key_of
    config = dataclasses.replace(script.DEBUG, data=write_store(tmp_path / "data", dict.fromkeys(ids_of("train"), 12)))
    train = config.train

    def key(config, tokenizer=TOKENIZER):
        source = StoreSource(config.data, config.train.shapes, 0, actions=config.actions)
        return key_of(config, source, tokenizer, config.corpus)

    plain = key(config)
    assert plain == key(config)
    other = write_store(tmp_path / "other", dict.fromkeys(ids_of("train"), 13))
    add_latents(other)
    repainted = write_store(tmp_path / "repainted", dict.fromkeys(ids_of("train"), 12), noise=True)
    assert (repainted / "index.json").read_bytes() == (config.data / "index.json").read_bytes()
    latent = dataclasses.replace(config, data=other, actions="latent")
    changed = [
        key(config, Identity(3, "cd" * 32)),
        key(dataclasses.replace(config, data=other)),
        key(dataclasses.replace(config, data=repainted)),
        key(latent),
        key(dataclasses.replace(config, corpus=7)),
        key(dataclasses.replace(config, label_fraction=0.5)),
        key(
            dataclasses.replace(
                config, train=dataclasses.replace(train, long_every=0, clip_length=train.clip_length - 1)
            )
        ),
    ]
    add_latents(write_store(tmp_path / "third", dict.fromkeys(ids_of("train"), 13)), digest="cd" * 32)
    changed.append(key(dataclasses.replace(latent, data=tmp_path / "third")))
    toy = dataclasses.replace(config, data=None, toy=ToyConfig(16, 16, max_side=8))
    for world in (toy, dataclasses.replace(toy, toy=ToyConfig(16, 16, max_side=7))):
        for seed in (0, 1):
            seeded = dataclasses.replace(world, train=dataclasses.replace(train, seed=seed))
            changed.append(key_of(seeded, script.make_source(seeded), TOKENIZER, seeded.corpus))
    keys = [plain, *changed]
    assert all(a != b for n, a in enumerate(keys) for b in keys[n + 1 :])


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [pytest.param("dynamics", "tokenizer", marks=pytest.mark.slow), ("maskgit", "video_tokenizer")],
)
def test_a_run_that_goes_on_encodes_nothing_again(scripts, run_of, tmp_path, monkeypatch, kind, tokenizer):
    script, sources = scripts[f"train_{kind}"], []

    def fit(objective, source, *_, **__):
        sources.append(source)

    command = ("debug", "--tokenizer", run_of(tokenizer), "--corpus", "3")
    noise_run(script, tmp_path / "run", *command, fit=fit)
    assert Path(tmp_path / "run" / "corpus" / "manifest.json").exists()
    monkeypatch.setattr(script, "encode_corpus", lambda *_: fail())
    noise_run(script, tmp_path / "run", *command, fit=fit)
    first, again = sources
    assert_same(again.corpus, first.corpus)
    assert first.corpus.latents.std() > 0
