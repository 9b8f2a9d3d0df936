"""What notebooks and prompts show of a report and of the adapters in a module."""

import copy
import pickle
from html.parser import HTMLParser

import torch
from torch import nn

from lightning_lora import Memory, MemoryReport, adapters, inject


class Cells(HTMLParser):
    """Reads the text of each cell, and which tags there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.depth = 0
        self.feed(text)
        self.close()
        assert self.depth == 0, "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.depth += 1
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()


TAGS = {"table", "thead", "tbody", "tr", "th", "td", "div"}


def report(note: str) -> MemoryReport:
    lora = Memory(parameters=2048, gradients=512, optimizer=1024, activations=3 * 2**20)
    full = Memory(2000, 2000, None, 4 * 2**20, derived=frozenset({"gradients", "optimizer", "activations"}))
    return MemoryReport(lora, full, notes=(note,))


def test_a_notebook_shows_a_report_as_the_table_that_is_printed():
    shown = Cells(report("one <b>note</b> & more")._repr_html_())
    assert shown.tags <= TAGS
    assert shown.rows[0] == ["Memory", "LoRA", "Full fine-tuning", "Saved"]
    assert shown.rows[1] == ["Parameters", "2.0 KiB", "2.0 KiB", "-48 B"]
    assert shown.rows[3] == ["Optimizer", "1.0 KiB", "unknown", "unknown"]
    assert shown.rows[4][:3] == ["Activations", "3.0 MiB", "4.0 MiB*"]
    assert "&lt;b&gt;note&lt;/b&gt; &amp; more" in report("one <b>note</b> & more")._repr_html_()


def module(hostile: str = "<script>alert(1)</script>") -> nn.Module:
    layers = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 3)])})
    layers[hostile] = nn.Linear(8, 4)
    inject(layers, rank=2)
    return layers


def test_a_notebook_shows_adapters_with_their_names_escaped():
    found = adapters(module())
    shown = Cells(found._repr_html_())
    assert shown.tags <= TAGS
    header, *rows = shown.rows
    assert header == ["Adapters", "Count", "Decomposition", "Weight", "Rank", "Params"]
    assert ["blocks.*", "2", "product", "4 x 8", "2", "48"] in rows
    assert ["blocks.2", "1", "product", "3 x 4", "2", "14"] in rows
    assert ["<script>alert(1)</script>", "1", "product", "4 x 8", "2", "24"] in rows


def test_adapters_are_a_dictionary_whose_text_has_each_name_and_no_tensor():
    found = adapters(module("head"))
    assert isinstance(found, dict)
    assert found == dict(found)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    text = repr(found)
    assert "blocks.*" in text
    assert "head" in text
    assert "tensor" not in text
    assert len(text.splitlines()) == 2 + 3
    again = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert list(again) == list(found)
    assert torch.equal(again["head"].A, found["head"].A)


def test_a_module_without_adapters_has_an_empty_table():
    found = adapters(nn.Linear(2, 2))
    assert found == {}
    assert repr(found) == "no adapters"
    assert Cells(found._repr_html_()).rows == [["Adapters", "Count", "Decomposition", "Weight", "Rank", "Params"]]
