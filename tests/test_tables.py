"""The README's tables, the picture and the waterfall say what the result files say."""

import xml.etree.ElementTree as ElementTree

import tables
import waterfall
from generated import BEGIN, END
from roofline import roofline


def reached(name, what, value, bound, batch=1, tok_s=250.0, nbytes=16_000_000_000):
    row = {"depth": 128, "batch": batch, "tok_s": tok_s, "ms_per_step": 4.0, "gb_s": 4000.0}
    met = None if bound is None else value >= bound if what == "share" else value <= bound
    return {
        "name": name,
        "what": what,
        "value": value,
        "bound": bound,
        "met": met,
        "row": {**row, "bytes_per_step": nbytes, "samples": [tok_s]},
    }


def suite(file, *rows):
    model = {
        "loaded": {"shape": "llama-3.1-8b", "format": "bf16", "head_format": "bf16"},
        "read_gb_s": [4400.0, 4500.0, 4600.0],
        "reached": list(rows),
    }
    return {"kind": "suite", "gpu": {"name": "NVIDIA H200"}, "models": [model], "file": file}


OLD = suite("a.json", reached("x", "share", 0.5, 0.96), reached("y", "share", 0.7, 0.92))
NEW = suite(
    "b.json",
    reached("x", "share", 0.9711, 0.96, tok_s=303.25),
    reached("b1", "share", 0.9, None),
    reached("b8", "step ratio", 1.0961, 1.08, batch=8),
    reached("jitter", "jitter", 1.0123, 1.02),
)


def test_a_suite_s_rows_stand_beside_their_targets_and_the_newest_counts():
    text = tables.tables([OLD, NEW])
    assert "| llama-3.1-8b bf16 | 128 | 1 | 303.2 | 4000 | 4000 of 4500 | 97.1% |" in text
    assert "| 97.1% | ≥ 96.0% | yes |" in text
    assert "| 70.0% | ≥ 92.0% | no |" in text
    assert "| 1.096 x | ≤ 1.080 x | no |" in text
    assert "| p99 1.012 x median | ≤ p99 1.020 x median | yes |" in text
    assert "| 90.0% |  |  |" in text
    assert "50.0%" not in text
    assert "docs/roofline.svg" in text


def test_what_ends_a_launch_stands_beside_its_limit():
    def row(what, longest):
        times = {"p50_ms": 0.5, "p99_ms": 1.25, "max_ms": longest}
        return {"what": what, **times, "met": longest <= 2.0, "samples_ms": [longest]}

    model = {
        "name": "llama-3.2-1b",
        "token_ms": 0.85,
        "rows": [row("join", 1.5), row("cancel", 2.5)],
    }
    text = tables.tables(
        [
            {
                "kind": "interrupt",
                "gpu": {"name": "NVIDIA H200"},
                "limit_ms": 2.0,
                "models": [model],
                "file": "i.json",
            }
        ]
    )
    assert "| llama-3.2-1b | joins | 0.85 | 0.50 | 1.25 | 1.50 | 2.0 | yes |" in text
    assert "| llama-3.2-1b | is cancelled | 0.85 | 0.50 | 1.25 | 2.50 | 2.0 | no |" in text


def test_the_picture_shows_every_share_below_the_measured_roof():
    root = ElementTree.fromstring(roofline([OLD, NEW]))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "the roof: 4500 GB/s, measured" in words
    assert {"x 97%", "y 70%", "b1 90%"} <= set(words)
    assert not any("b8" in word or "jitter" in word for word in words)
    dots = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 3
    assert roofline([]) == ""


def test_the_waterfall_page_has_the_newest_timeline_of_each_model():
    def timeline(us, date):
        parts = [
            {"name": "reading at the measured bandwidth", "us": us, "idle": False},
            {"name": "hand-off down → qkv", "us": us / 4, "idle": True},
        ]
        stage = {name: 1.25 for name in ("work_us", "work_max_us", "wait_us", "wait_max_us")}
        return {
            "what": "1B",
            "date": date,
            "git": {"commit": "abc"},
            "gpu": {"name": "H200"},
            "read_gb_s": 4500.0,
            "waterfall": parts,
            "stages": [{"stage": "qkv", "calls": 16, "ring_us": 2.0, **stage}],
            "file": "f.json",
        }

    page = waterfall.with_tables(f"before {BEGIN}old{END} after", [timeline(400.0, "2026-01-01")])
    assert page.startswith("before ")
    assert page.endswith(" after")
    assert "| idle | hand-off down → qkv | 100.0 | 20.0% |" in page
    assert "| qkv | 16 | 1.2 | 1.2 | 1.2 | 1.2 | 2.0 |" in page
    assert "**500.0**" in page
