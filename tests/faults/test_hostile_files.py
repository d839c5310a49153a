r"""Forged files of every kind that the package reads: each entry of each file replaced by each of many values."""

from __future__ import annotations

import random
import resource
import shutil
import warnings

import numpy as np
import pytest
import torch
from deepinv.physics import Denoising

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
from deepinv_deq.datasets import load_images
from deepinv_deq.files import load_intact, save_intact
from deepinv_deq.physics import SparseLinearPhysics
from tests.faults.common import FULL, HOSTILE, TRIED
from tests.faults.runs import faulty_run

HUGE = torch.zeros(1).expand(2**20, 2**20)  # a view of one number, that asks for 4 TiB
VALUES = [
    None, -1, 10**6, 2**70, 0.5, float("nan"), "x", "", b"\0", [], {}, (), [[]], {"a": {}}, True, 1j, torch.zeros(0),
    torch.tensor(float("nan")), torch.ones(3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.cfloat), torch.eye(2).to_sparse(), HUGE,
    (10**6, 10**6), {"kind": "torch", "state": torch.zeros(1)}, torch.float32,
]  # fmt: skip
VIEW = next(i for i, value in enumerate(VALUES) if value is HUGE)


def entries(content, path=()):
    r"""Paths of all entries of nested dictionaries and lists; of long lists the first only."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[: None if isinstance(content, dict) else 1]:
        yield (*path, key)
        yield from entries(value, (*path, key))


def replaced(content, path, value):
    key, *rest = path
    twin = dict(content) if isinstance(content, dict) else list(content)
    twin[key] = replaced(twin[key], rest, value) if rest else value
    return twin


def weights_of_a_network(folder):
    net = EquilibriumUNet(1, channels=(4, 8))
    save_intact({"settings": net.settings, "state_dict": net.state_dict()}, folder / "weights.pt")
    return folder / "weights.pt", lambda path: EquilibriumUNet(pretrained=path)


def model(folder):
    DEQReconstructor(DEProx(EquilibriumUNet(1, channels=(4, 8)))).save_pretrained(folder / "model.pt", about="x")
    return folder / "model.pt", DEQReconstructor.from_pretrained


def cache(folder):
    physics, path = Denoising(), folder / "cache.pt"
    SparseLinearPhysics.from_physics(physics, (1, 3, 3), cache=path)
    return path, lambda path: SparseLinearPhysics.from_physics(physics, (1, 3, 3), cache=path)


def checkpoint(folder):
    trainer, _ = faulty_run(folder / "run", epochs=1)
    trainer.train()
    path = folder / "checkpoint.pt"
    shutil.copy(next((folder / "run").rglob("ckp_0.pth.tar")), path)

    def resume(path):
        other, _ = faulty_run(None, epochs=2, ckpt_pretrained=str(path))
        other.setup_train()

    return path, resume


@pytest.mark.parametrize("make", [weights_of_a_network, model, cache, checkpoint])
def test_any_entry_replaced_by_anything(tmp_path, make):
    path, read = make(tmp_path)
    content = load_intact(path)
    cases = [(place, i) for place in entries(content) for i in range(len(VALUES))]
    cases = random.Random(0).sample(cases, min(len(cases), 200 if FULL else 25))
    cases += [((key,), VIEW) for key in content]
    before, refused = memory(), 0
    for place, i in cases:
        forged = replaced(content, place, VALUES[i])
        if i == VIEW:
            torch.save(forged, path)  # its digest would take as much memory as it asks for
        else:
            save_intact(forged, path)  # with digests that are right
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except ValueError as error:
            assert path.name in str(error), (place, VALUES[i] if i != VIEW else "a huge view", error)
            refused += 1
        TRIED[HOSTILE] += 1
    assert refused > 0.3 * len(cases) and memory() - before < 2**20  # in KiB: less than 1 GiB


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_pictures_and_arrays_of_other_kinds(tmp_path):
    rng, good = random.Random(0), np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 4, 4)
    np.savez(tmp_path / "good.npz", images=good)
    np.save(tmp_path / "good.npy", good)
    from PIL import Image

    Image.fromarray((255 * good[0]).astype(np.uint8)).save(tmp_path / "good.png")
    Image.fromarray((255 * good[0]).astype(np.uint8)).save(tmp_path / "good.tif")
    torch.save({"images": torch.zeros(2)}, tmp_path / "good.pt")
    files = sorted(tmp_path.iterdir())
    for file in files:
        whole, others = file.read_bytes(), [f for f in files if f.suffix != file.suffix]
        hostile = [rng.choice(others).read_bytes(), whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0" * 100]
        hostile += [bytes([*whole[:k], whole[k] ^ 0xFF, *whole[k + 1 :]]) for k in rng.sample(range(len(whole)), 5)]
        for i, data in enumerate(hostile):
            for suffix in (".npz", ".npy", ".png", ".tif", ".dcm"):
                path = tmp_path / f"hostile{suffix}"
                path.write_bytes(data)
                try:
                    images = load_images(path)
                except ValueError as error:
                    assert path.name in str(error)
                else:
                    same = [good, good[:1]]
                    ok = any(images.shape[0] == len(g) and np.allclose(images[:, 0], g, atol=1 / 250) for g in same)
                    assert ok, (file, i, suffix)
                TRIED[HOSTILE] += 1
                path.unlink()


def test_a_view_of_one_number_is_refused_before_it_is_copied(tmp_path):
    torch.save({"state_dict": {"w": HUGE}}, tmp_path / "huge.pt")
    with pytest.raises(ValueError, match="huge.pt cannot be trusted.*ask for 4,398,046,511,104 bytes"):
        load_intact(tmp_path / "huge.pt")
    torch.save({"w": torch.zeros(1).expand(1000, 1000)}, tmp_path / "view.pt")  # views of a harmless size are read
    assert load_intact(tmp_path / "view.pt")["w"].shape == (1000, 1000)
