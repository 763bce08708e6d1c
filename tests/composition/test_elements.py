"""The small testbed: what its adapters add can be seen, by a judge that can see it."""

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter

from lora_ws.composition.elements import ELEMENTS, ElementJudge, render
from lora_ws.composition.testbed import bundled
from lora_ws.diffusion.digits import NAMES, digit_pictures
from lora_ws.diffusion.generation import GenerationSpec
from lora_ws.diffusion.hooks import compose
from lora_ws.diffusion.methods import BatchedSets, Composite, Merge, Switch
from lora_ws.diffusion.pipeline import (
    decode_latents,
    encode_images,
    generate,
    load_pipeline,
)
from lora_ws.errors import ConfigError


@pytest.fixture(scope="module")
def judge() -> ElementJudge:
    pictures, digits = digit_pictures(16)
    pipeline = load_pipeline("digit-sd")
    return ElementJudge.train(
        pictures,
        [NAMES[k] for k in digits],
        lambda x: decode_latents(pipeline, encode_images(pipeline, x)),
    )


def test_elements_are_drawn_as_they_say() -> None:
    pictures, _ = digit_pictures(16)
    one = pictures[:1]
    bold = maximum_filter(one[0, 0].numpy(), size=3, mode="constant", cval=-9)
    assert np.allclose(render(one, ["bold"])[0, 0].numpy(), bold)
    hoops, pins = render(one, ["hoops"]), render(one, ["pinstripes"])
    assert torch.equal(hoops[..., 2:4, :], one[..., 2:4, :])
    assert float(hoops[..., 0:2, :].max()) <= -0.5
    assert torch.equal(pins[..., :, 2:4], one[..., :, 2:4])
    foot, side = render(one, ["footlight"]), render(one, ["sidelight"])
    assert float(foot[..., -1, :].min()) == float(side[..., :, -1].min()) == pytest.approx(0.2)
    sun, ball = render(one, ["sun"]), render(one, ["ball"])
    assert float(sun[..., 1:4, 1:4].min()) == float(ball[..., 12:15, 12:15].min()) == 1
    assert torch.equal(sun[..., 5:, 5:], one[..., 5:, 5:])


@pytest.mark.slow
def test_the_judge_is_right_on_digits_it_has_not_seen(judge: ElementJudge) -> None:
    accuracy = judge.accuracy
    assert min(accuracy[c] for c in accuracy if c != "character") > 0.95
    assert accuracy["character"] > 0.7
    with pytest.raises(ConfigError, match="did you mean `three`"):
        judge.shown(torch.zeros(1, 3, 16, 16), "thre")


@pytest.mark.slow
def test_every_adapter_adds_its_element(judge: ElementJudge) -> None:
    pipeline, testbed = load_pipeline("digit-sd"), bundled()
    names = [member.id for member in testbed.members]
    files = [testbed.file(member) for member in testbed.members]
    sets, images = tuple((k,) for k in range(len(names))), 4
    generation = GenerationSpec("a photo of sks", num_inference_steps=12)
    plain = generate(pipeline, generation, images=images)
    with compose(pipeline, files, BatchedSets(Merge(), sets)):
        seeds = [image for image in range(images) for _ in names]
        drawn = generate(pipeline, generation, seeds=seeds)
    for k, name in enumerate(names):
        shown = judge.shown(drawn[k :: len(names)], name).mean()
        assert shown >= 0.5, name
        assert shown > judge.shown(plain, name).mean() + 0.2, name


@pytest.mark.slow
def test_switch_and_composite_keep_digits_that_merging_breaks(judge: ElementJudge) -> None:
    """Sets of three adapters, and a prompt that names a digit."""
    pipeline, testbed = load_pipeline("digit-sd"), bundled()
    names = [member.id for member in testbed.members]
    files = [testbed.file(member) for member in testbed.members]
    # Those of four with the first character, without it.
    sets = [
        tuple(names.index(member.id) for member in one[1:])
        for one in testbed.sets(4)
        if one[0] == testbed.members[0]
    ]
    digits = [NAMES[k % 10] for k in range(len(sets))]
    prompts = tuple(f"a photo of {digit}" for digit in digits)
    generation = GenerationSpec(prompts, guidance_scale=3.0, num_inference_steps=20)
    kept, shown = {}, {}
    for name, method in (("merge", Merge()), ("switch", Switch()), ("composite", Composite())):
        with compose(pipeline, files, BatchedSets(method, tuple(sets))):
            drawn = generate(pipeline, generation, seeds=[0] * len(sets))
        kept[name] = np.mean(np.array(judge.digits(drawn)) == digits)
        every = {k: judge.shown(drawn, names[k]) for k in {k for one in sets for k in one}}
        shown[name] = np.mean([every[k][n] for n, one in enumerate(sets) for k in one])
    print(kept, shown)
    assert min(kept["switch"], kept["composite"]) >= kept["merge"] + 0.2
    # What is averaged away with the damage: no method wins both.
    assert shown["merge"] > shown["composite"]


def test_every_element_has_its_adapter() -> None:
    assert {member.id for member in bundled().members} == set(ELEMENTS)
    assert all(ELEMENTS[m.id].category == m.category for m in bundled().members)
