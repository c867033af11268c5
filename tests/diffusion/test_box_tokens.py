"""Boxes as tokens: what is made of them, where they come from, and which are refused."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.condition import Request, network_inputs, unconditional_inputs
from unet_diffusion.runtime.pictures import over_white

BOXES = [["dog", 0, 0, 4, 8], ["cat", 2, 2, 8, 8]]  # of an image of 16 x 16


def data(*boxes, names=None) -> SimpleNamespace:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in boxes]
    image_set = SimpleNamespace(names=names or [f"{i}.png" for i in range(len(boxes))])
    return SimpleNamespace(entries={"boxes": texts}, image_set=image_set, image_shape=(3, 16, 16), codec=None)


def bound(*boxes, **options) -> BoxTokens:
    torch.manual_seed(0)
    condition = BoxTokens(8, **{"num_classes": 3, "max_boxes": 2, "num_heads": 2, **options})
    condition.bind_data(data(*boxes))
    return condition


def test_boxes_are_class_and_sides_as_shares_and_the_largest_first():
    condition = bound(BOXES, [])
    entry = condition.read({"index": torch.tensor([0, 1])})
    assert condition.names == ["cat", "dog"]
    cat, dog, none = [0, 0.125, 0.125, 0.625, 0.625], [1, 0, 0, 0.25, 0.5], [3, 0, 0, 0, 0]
    assert entry.tolist() == [[cat, dog], [none, none]]


def test_boxes_of_mirrored_images_are_mirrored():
    condition = bound(BOXES)
    entry = condition.read({"index": torch.tensor([0, 0]), "is_mirrored": torch.tensor([True, False])})
    assert entry[0].tolist() == [[0, 0.375, 0.125, 0.875, 0.625], [1, 0.75, 0, 1, 0.5]]
    assert torch.equal(entry[1], condition.read({"index": torch.tensor([0])})[0])


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_outlines_of_boxes_are_seen_on_black(channels):
    condition = bound(BOXES)
    batch = {"images": torch.zeros(1, channels, 16, 16)}
    seen = over_white(condition.seen(batch, {"boxes": condition.read({"index": torch.tensor([0])})}))[0, 0]
    assert seen[12:].eq(-1).all()  # below both boxes
    assert (seen[0, :5] > seen[9, 2]).all()  # the dog, of the later name, and the lower edge of the cat


def test_order_of_boxes_does_not_matter():
    condition = bound(BOXES).eval()
    entry = condition.read({"index": torch.tensor([0])})
    swapped = condition(entry.flip(1)).flip(1)
    torch.testing.assert_close(condition(entry), swapped, atol=1e-6, rtol=1e-5)  # of another order of sums


def test_null_is_the_image_without_boxes_and_not_the_one_with_them():
    condition = bound(BOXES, []).eval()
    entry = {"boxes": condition.read({"index": torch.tensor([0, 1])})}
    tokens, null = network_inputs([condition], entry)["context"], unconditional_inputs([condition], entry)["context"]
    torch.testing.assert_close(tokens[1], null[1])
    assert (tokens[0] - null[0]).abs().max() > 1e-3


def test_every_parameter_receives_gradient():
    condition = bound(BOXES, [])
    condition(condition.read({"index": torch.tensor([0, 1])})).square().sum().backward()
    assert [name for name, one in condition.named_parameters() if one.grad is None] == []
    assert condition.encoder.class_embedding.weight.grad[[0, 1, 3]].abs().amin(dim=1).gt(0).all()


def test_names_are_part_of_the_state():
    state = bound(BOXES).state_dict()
    again = BoxTokens(8, 3, max_boxes=2, num_heads=2)
    again.load_state_dict(state)
    assert again.names == ["cat", "dog"]


def test_names_of_a_checkpoint_number_the_boxes_of_data_that_were_read_before():
    state, again = bound([["dog", 0, 0, 4, 4]], [["elk", 0, 0, 4, 4]]).state_dict(), bound([["elk", 0, 0, 4, 4]])
    again.load_state_dict(state)
    assert again.read({"index": torch.tensor([0])})[0, 0, 0] == 1
    with pytest.raises(ValueError, match=re.escape("that the checkpoint knows (dog, elk), got cat (0.png)")):
        bound([["cat", 0, 0, 4, 4]]).load_state_dict(state)


def test_more_boxes_than_tokens_are_told():
    condition = bound([*BOXES, ["cat", 0, 0, 1, 1]], BOXES)
    assert condition.notes() == ["boxes: 2 names (cat, dog); of 1 images only the 2 largest boxes"]


@pytest.mark.parametrize(
    ("boxes", "options", "said"),
    [
        ([["cat", 0, 0, 4]], {}, "boxes of 0.png must be JSON of [name, left, top, width, height], got"),
        ("cat", {}, "boxes of 0.png must be JSON of [name, left, top, width, height], got 'cat'"),
        ([["cat", 10, 0, 9, 4]], {}, "must lie within the image of 16 x 16 (width x height), got 'cat' at left 10"),
        (BOXES, {"num_classes": 1}, "num_classes of BoxTokens must be at least 2, as many as the names in the data"),
        (BOXES, {"num_heads": 3}, "context_dim must be a multiple of num_heads, got 8 and 3"),
    ],
)  # fmt: skip
def test_boxes_that_cannot_be_are_refused_before_training(boxes, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        bound(boxes, **options)


def test_names_that_a_checkpoint_does_not_know_are_refused():
    condition = bound(BOXES)
    with pytest.raises(ValueError, match=re.escape("that the checkpoint knows (cat, dog), got horse (0.png)")):
        condition.bind_data(data([["horse", 0, 0, 4, 4]]))


def test_data_without_boxes_are_refused():
    with pytest.raises(ValueError, match=r"set data.boxes to a JSON file of COCO's form"):
        BoxTokens(8, 3).bind_data(SimpleNamespace(entries={}))


# ------------------------------------------------------------------------------------------------ users


def asked(value) -> torch.Tensor:
    request = Request(3, values={"boxes": value}, image_shape=(3, 16, 16))
    return bound(BOXES).from_user(request)["boxes"]


def test_user_gives_a_list_several_lists_or_a_file_of_either_form(tmp_path):
    one, none = asked(BOXES), asked([])
    assert one.shape == (3, 2, 5)
    assert torch.equal(asked([BOXES, []]), torch.stack([one[0], none[0], one[0]]))  # by turns
    (tmp_path / "list.json").write_text(json.dumps(BOXES))
    assert torch.equal(asked(tmp_path / "list.json"), one)
    table = {  # of an image of twice the height and width
        "images": [{"id": 1, "file_name": "a.png", "width": 32, "height": 32}],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 6, "bbox": [0, 0, 8, 16]},
            {"image_id": 1, "category_id": 5, "bbox": [4, 4, 16, 16]},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(table))
    assert torch.equal(asked(str(tmp_path / "coco.json")), one)


def test_images_of_a_file_take_turns_by_name_like_those_of_a_folder():
    table = {
        "images": [
            {"id": i, "file_name": name, "width": 16, "height": 16} for i, name in enumerate(["b.png", "a.png"])
        ],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 5, "bbox": [0, 0, 4 + 4 * i, 8]} for i in range(2)],
    }
    a, b = [["cat", 0, 0, 8, 8]], [["cat", 0, 0, 4, 8]]
    assert torch.equal(asked(table), asked([a, b]))
    assert bound(BOXES).image_names(table) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ([["cart", 0, 0, 4, 4]], ValueError, "boxes must have names among cat, dog, got 'cart'; did you mean cat?"),
        ([["cat", 0, 0, 40, 4]], ValueError, "boxes must lie within the image of 16 x 16"),
        ([["cat", 0, 0]], ValueError, "boxes must be a list of (name, left, top, width, height) in pixels"),
        ("nowhere.json", FileNotFoundError, "boxes must be a JSON file, and there is none at nowhere.json"),
    ],
)
def test_user_is_told_what_boxes_must_be(value, error, said):
    with pytest.raises(error, match=re.escape(said)):
        asked(value)
