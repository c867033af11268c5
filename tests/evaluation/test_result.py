"""Results of an evaluation: JSON, a page that holds its pictures, and text."""

import json
import re

from PIL import Image

from unet_diffusion.evaluation.result import Evaluation, Figure, Picture, Section, Table, number_text


def evaluation() -> Evaluation:
    figures = [
        Figure("fd", "Fréchet distance", 12.345678, "lower", real=3.0, remark="Biased <upwards> by 2 %."),
        Figure("kid", "KID", float("nan"), "lower", interval=(0.1, 0.2)),
    ]
    table = Table("classes", "By class", ["class", "images", "fd"], [["cat", 1000, 1.5], ["<dog>", 10, None]])
    picture = Picture("grid", "Samples.", Image.new("RGB", (3, 2), "red"))
    section = Section("How close?", "Distances & more.", figures, [table], [picture], ["Too few images; draw more."])
    return Evaluation("runs/<x>", {"images": 64, "scheduler": "DDIM"}, [section])


def test_json_holds_all_figures_and_is_valid(tmp_path):
    evaluation().save(tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert stored["figures"]["fd"]["value"] == 12.345678
    assert stored["figures"]["kid"]["value"] is None  # JSON has no NaN
    assert stored["tables"]["classes"]["rows"][1] == ["<dog>", 10, None]
    assert stored["warnings"] == ["Too few images; draw more."]
    assert stored["protocol"] == {"images": 64, "scheduler": "DDIM"}


def test_page_needs_no_other_file_and_no_network():
    page = evaluation().page()
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    assert page.count('<figure id="grid"><img src="data:image/png;base64,') == 1


def test_page_shows_every_figure_and_escapes_names():
    page = evaluation().page()
    for text in ("runs/&lt;x&gt;", "12.35", "0.1 to 0.2", "&lt;dog&gt;", "Biased &lt;upwards&gt;", "1,000"):
        assert text in page
    assert "<dog>" not in page


def test_text_has_a_line_for_each_figure_and_warning():
    text = str(evaluation())
    assert "Fréchet distance: 12.35  (real images: 3)" in text
    assert "KID: - [0.1, 0.2]" in text
    assert "! Too few images" in text


def test_numbers_are_short():
    assert [number_text(x) for x in (None, float("inf"), 0.000123456, 1234567, "a", 0.5)] == [
        *("-", "-", "0.0001235", "1,234,567", "a", "0.5")
    ]
