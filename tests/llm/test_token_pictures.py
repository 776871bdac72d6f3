"""Pictures of a step: well-formed, with every token, whatever it holds."""

from xml.etree import ElementTree

import torch

from taurl.llm.pictures.token_pictures import MOST_TOKENS, WIDTH, ratio_picture, token_picture

SVG = "{http://www.w3.org/2000/svg}"


def test_every_token_stands_once_for_each_figure_within_the_page():
    texts = ["The", " answer", "\n", "<b>&", "\x00", ""] * 20
    rewards = [0.0] * len(texts)
    rewards[-1], rewards[0] = 1.0, -0.5
    root = ElementTree.fromstring(token_picture(texts, {"rewards": rewards, "values": rewards[::-1]}, title="a < b"))
    boxes = root.findall(f"{SVG}rect")[1:]
    assert len(boxes) == 2 * len(texts)
    assert all(float(box.get("x")) + float(box.get("width")) <= WIDTH for box in boxes)
    fills = [box.get("fill") for box in boxes]
    assert (fills[len(texts) - 1], fills[1]) == ("rgb(33,102,172)", "rgb(247,247,247)")
    shown = [text.text for text in root.findall(f"{SVG}text")]
    assert {"The", "·answer", "⏎", "<b>&", "�", "∅"} <= set(shown)
    assert "rewards, from −0.5 to 1" in shown


def test_a_long_completion_is_cut():
    root = ElementTree.fromstring(token_picture(["ab"] * 500, {"values": [0.0] * 500}, title="t"))
    assert len(root.findall(f"{SVG}rect")) == MOST_TOKENS + 1
    assert "340 more tokens not shown" in root.findall(f"{SVG}text")[0].text


def test_the_histogram_is_of_the_logarithms_with_all_that_is_beyond_at_the_ends():
    ratios = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 100.0, 2.0, torch.inf])
    root = ElementTree.fromstring(ratio_picture(ratios, 3))
    heights = [float(bar.get("height")) for bar in root.findall(f"{SVG}rect")[1:]]
    assert heights[20] == max(heights) == 160
    assert (heights[0], heights[-1]) == (40, 120)
    assert sum(height > 0 for height in heights) == 3
    ElementTree.fromstring(ratio_picture(torch.ones(0), 1))
