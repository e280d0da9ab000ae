"""The learnt decoders that redraw faces: same bytes each time, any size, and a training that can be cut off."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file

from data_gen import decoders
from data_gen.decoders import DESIGNS, Autoencoder, redraw
from tests.raising import raises
from x2dfd.experts import read_card
from x2dfd.files import file_sha256

ASTRONAUT = np.array(skimage.data.astronaut())[0:203, 120:331]


def test_the_number_of_threads_changes_no_byte() -> None:
    """Bug prevented: forgeries that differ between one worker and two."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = redraw(ASTRONAUT, DESIGNS[0].name)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert np.array_equal(redraw(ASTRONAUT, DESIGNS[0].name), two)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_training_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: decoders trained twice, or fakes among the photos that they learn from."""
    lines = ["path,label,method,split"]
    for k, label in enumerate(("real", "real", "fake")):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.array(skimage.data.astronaut())[..., ::-1])
        lines.append(f"{k}.png,{label},{'none' if label == 'real' else 'swap'},{'calib' if k == 1 else 'train'}")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    used: list[list[int]] = []
    real_train = decoders.train_one

    def noted(design: object, crops: object, rows: np.ndarray, steps: int) -> Autoencoder:
        used.append(rows.tolist())
        if len(used) == 2:
            raise KeyboardInterrupt
        return real_train(design, crops, rows, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(decoders, "DESIGNS", DESIGNS[:3])
    monkeypatch.setattr(decoders, "train_one", noted)
    out = tmp_path / "d.safetensors"
    with pytest.raises(KeyboardInterrupt):
        decoders.train(tmp_path / "m.csv", 2, tmp_path / "work", out)
    assert not out.exists()
    decoders.train(tmp_path / "m.csv", 2, tmp_path / "work", out)
    assert used == [[0]] * 4  # the first decoder once, the second twice, the third once
    assert {k.split(".")[0] for k in load_file(out)} == {d.name for d in DESIGNS[:3]}
    card = read_card(tmp_path / "d.card.json")
    assert card.sha256 == file_sha256(out) and card.figures["n"] == 1
    (tmp_path / "f.csv").write_text("path,label,method,split\n0.png,real,denoise,train\n", encoding="utf-8")
    with raises("no_real_picture"):
        decoders.train(tmp_path / "f.csv", 2, tmp_path / "work", out)


def test_the_committed_decoders_redraw_a_picture_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: an untrained decoder, colours shifted, odd sides cut off or moved; one decoder under six names;
    weights replaced without their card, or not checked out."""
    drawn = [redraw(ASTRONAUT, design.name) for design in DESIGNS]
    for k, found in enumerate(drawn):
        assert found.shape == ASTRONAUT.shape and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
        error = np.abs(found - ASTRONAUT).mean()
        assert 1 < error < 14 and np.abs(found[:, 4:] - ASTRONAUT[:, :-4]).mean() > 1.3 * error
        assert all(np.abs(found - other).mean() > 1 for other in drawn[:k])
    card = read_card(decoders.WEIGHTS.with_suffix(".card.json"))
    assert card.sha256 == file_sha256(decoders.WEIGHTS)
    assert set(card.figures["psnr_db_on_unseen_people"]) == {d.name for d in DESIGNS}
    monkeypatch.setattr(decoders, "WEIGHTS", tmp_path / "none.safetensors")
    with raises("decoders_missing", "python -m data_gen decoders"):
        redraw(ASTRONAUT, DESIGNS[0].name)
